"""The loader: a pure function of seed and step, whatever the workers and ranks."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from luban.core.errors import ConfigError, DataError
from luban.data.batch import Batch
from luban.data.loader import Loader, sequential_batches
from luban.data.shards import Shards

FIELDS = ("tokens", "targets", "loss_mask", "documents", "positions")


def same(left: Batch, right: Batch) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in FIELDS)


@pytest.fixture(params=["stream", "fit"])
def packing(request):
    return request.param


@pytest.fixture
def shards(text_shards):
    return Shards.open(text_shards)


def loader(shards, packing, **changes):
    return Loader(shards, **{"batch_size": 4, "seq_len": 32, "seed": 7, "packing": packing, **changes})


def test_shapes_and_types(shards, packing):
    batch = loader(shards, packing).batch(3)
    assert {name: (getattr(batch, name).shape, str(getattr(batch, name).dtype)) for name in FIELDS} == {
        "tokens": ((4, 32), "int64"),
        "targets": ((4, 32), "int64"),
        "loss_mask": ((4, 32), "bool"),
        "documents": ((4, 32), "int32"),
        "positions": ((4, 32), "int32"),
    }


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_workers_change_nothing(shards, packing, workers):
    plain, threaded = loader(shards, packing), loader(shards, packing, workers=workers)
    for step, (a, b) in enumerate(islice(zip(plain.iterate(), threaded.iterate(), strict=False), 60)):
        assert same(a, b) and same(a, plain.batch(step))


@pytest.mark.parametrize("step", [1, 13, 200])
def test_a_resume_goes_on_with_the_next_batch(shards, packing, step):
    before = list(islice(loader(shards, packing).iterate(0), step + 3))
    after = list(islice(loader(shards, packing, workers=2).iterate(step), 3))
    assert all(same(a, b) for a, b in zip(before[step:], after, strict=True))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_are_one(shards, packing, world):
    whole = loader(shards, packing)
    ranks = [loader(shards, packing, rank=rank, world=world) for rank in range(world)]
    for step in (0, 5, 90):
        parts = [rank.batch(step) for rank in ranks]
        assert all(
            np.array_equal(np.concatenate([getattr(p, n) for p in parts]), getattr(whole.batch(step), n))
            for n in FIELDS
        )


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 2), (4, 1), (1, 4)])
def test_ranks_have_their_part_of_every_micro_batch(shards, packing, world, micro_batches):
    whole = loader(shards, packing).batch(7)
    cut = {"world": world, "micro_batches": micro_batches}
    ranks = [loader(shards, packing, rank=rank, **cut).batch(7) for rank in range(world)]
    for n in FIELDS:
        parts = [np.split(getattr(part, n), micro_batches) for part in ranks]
        joined = np.concatenate([parts[rank][i] for i in range(micro_batches) for rank in range(world)])
        assert np.array_equal(joined, getattr(whole, n))


def test_every_epoch_is_another_permutation_of_the_same_rows(shards, packing):
    one = loader(shards, packing, batch_size=1)
    size = one.sequences_per_epoch
    epochs = [[one.batch(e * size + i).tokens.tobytes() for i in range(size)] for e in range(2)]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert (one.epoch_of(0), one.epoch_of(size - 1), one.epoch_of(size)) == (0, 0, 1)


def test_a_batch_that_spans_epochs_has_rows_of_both(shards, packing):
    one, four = loader(shards, packing, batch_size=1), loader(shards, packing)
    step = one.sequences_per_epoch // 4
    rows = [one.batch(4 * step + i).tokens[0] for i in range(4)]
    assert np.array_equal(four.batch(step).tokens, np.stack(rows))


def test_a_batch_larger_than_the_split_repeats_it(shards, packing):
    large = loader(shards, packing, batch_size=1000, seq_len=512)
    assert large.batch(0).tokens.shape == (1000, 512)
    assert large.sequences_per_epoch < 500


def test_the_seed_is_the_order(shards, packing):
    assert same(loader(shards, packing).batch(2), loader(shards, packing).batch(2))
    assert not same(loader(shards, packing).batch(2), loader(shards, packing, seed=8).batch(2))


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"seq_len": 0}, {"world": 3}, {"rank": 1}, {"packing": "fitt"}])
def test_sizes_that_make_no_batch_are_refused(shards, packing, changes):
    with pytest.raises(ConfigError):
        loader(shards, **{"packing": packing, **changes})


def test_a_corpus_smaller_than_one_sequence_is_refused(shards):
    with pytest.raises(DataError, match="fewer than one sequence of 1000000"):
        loader(shards, "stream", seq_len=1_000_000)


@pytest.mark.parametrize("fixture", ["text_shards", "chat_shards"])
def test_evaluation_sees_every_target_once_in_full_batches(fixture, request):
    shards = Shards.open(request.getfixturevalue(fixture), "heldout")
    batches = list(sequential_batches(shards, batch_size=3, seq_len=40))
    assert {batch.tokens.shape for batch in batches} == {(3, 40)}
    found = Counter(t for batch in batches for t in batch.targets[batch.loss_mask].tolist())
    expected = Counter()
    for i in range(shards.documents):
        ids = shards.document(i)[1:]
        mask = slice(None) if shards.mask is None else shards.mask[shards.offsets[i] + 1 : shards.offsets[i + 1]] != 0
        expected.update(ids[mask].tolist())
    assert found == expected


def test_evaluation_of_text_is_in_order(text_shards):
    shards = Shards.open(text_shards, "heldout")
    tokens = np.concatenate([b.tokens[b.documents >= 0] for b in sequential_batches(shards, 2, 16)])
    assert np.array_equal(tokens, shards.data[:-1])
