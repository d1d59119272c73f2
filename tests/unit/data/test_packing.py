"""Packing: every target once, none across documents, rows as a plain loop would lay them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luban.core.errors import DataError
from luban.data.batch import Batch
from luban.data.packing import PACKINGS
from luban.data.packing.fit import best_fit
from luban.data.shards import Shards

PAD = 2


def shards_of(lengths: list[int], masked: bool, seed: int = 0) -> Shards:
    """Shards in memory: random ids ≥ 3, a random mask."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    return Shards(
        path="memory",
        split="train",
        data=rng.integers(3, 500, total).astype("<u2"),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        mask=rng.integers(0, 2, total).astype(np.uint8) if masked else None,
        config={"vocab_size": 500, "tokenizer_hash": "h", "pad_id": PAD},
        bytes=total,
        content_hash="c",
    )


def same(left: Batch, right: Batch) -> None:
    for name in ("tokens", "targets", "loss_mask", "documents", "positions"):
        a, b = getattr(left, name), getattr(right, name)
        assert a.dtype == b.dtype and np.array_equal(a, b), name


def plain(shards: Shards, rows: list[list[tuple[int, int, int]]], seq_len: int) -> Batch:
    """Rows given as lists of (document number in the row, first token, inputs), laid out one token at a time."""
    shape = (len(rows), seq_len)
    batch = Batch(
        tokens=np.full(shape, PAD),
        targets=np.full(shape, PAD),
        loss_mask=np.zeros(shape, bool),
        documents=np.full(shape, -1, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    begins = set(shards.offsets.tolist())
    for r, pieces in enumerate(rows):
        t = 0
        for number, start, size in pieces:
            for i in range(size):
                target = start + i + 1
                batch.tokens[r, t], batch.targets[r, t] = shards.data[start + i], shards.data[target]
                on = shards.mask is None or shards.mask[target]
                batch.loss_mask[r, t] = bool(on) and target not in begins
                batch.documents[r, t], batch.positions[r, t] = number, i
                t += 1
    return batch


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@settings(max_examples=150)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), masked=st.booleans())
def test_stream_rows_are_those_of_a_plain_loop(lengths, seq_len, masked):
    shards = shards_of(lengths, masked)
    if shards.tokens < seq_len + 1:
        with pytest.raises(DataError, match="fewer than one sequence"):
            PACKINGS["stream"](shards, seq_len)
        return
    packing = PACKINGS["stream"](shards, seq_len)
    rows = []
    for start in range(0, shards.tokens - 1, seq_len):
        pieces, stop = [], min(start + seq_len, shards.tokens - 1)
        for number in range(shards.documents):
            first, last = max(start, shards.offsets[number]), min(stop, shards.offsets[number + 1])
            if first < last:
                pieces.append((len(pieces), int(first), int(last - first)))
        rows.append(pieces)
    assert packing.rows == len(rows)
    same(packing.gather(np.arange(packing.rows)), plain(shards, rows, seq_len))


@settings(max_examples=150)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), masked=st.booleans(), packing=st.sampled_from(["stream", "fit"]))
def test_an_epoch_has_every_target_once(lengths, seq_len, masked, packing):
    shards = shards_of(lengths, masked)
    try:
        packed = PACKINGS[packing](shards, seq_len)
    except DataError:
        return
    batch = packed.gather(np.arange(packed.rows))
    begins = set(shards.offsets.tolist())
    expected = Counter(
        int(shards.data[i]) for i in range(shards.tokens) if i not in begins and (shards.mask is None or shards.mask[i])
    )
    assert Counter(batch.targets[batch.loss_mask].tolist()) == expected
    assert batch.target_count == sum(expected.values())
    assert not batch.loss_mask[batch.documents < 0].any()


@settings(max_examples=150)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), masked=st.booleans())
def test_fit_rows_hold_whole_documents(lengths, seq_len, masked):
    shards = shards_of(lengths, masked)
    if max(lengths) < 2:
        with pytest.raises(DataError, match="two tokens"):
            PACKINGS["fit"](shards, seq_len)
        return
    packing = PACKINGS["fit"](shards, seq_len)
    rows = []
    for r in range(packing.rows):
        pieces = packing.order[packing.first[r] : packing.first[r + 1]]
        rows.append([(n, int(packing.starts[p]), int(packing.sizes[p])) for n, p in enumerate(pieces)])
        assert sum(size for _, _, size in rows[-1]) <= seq_len
    same(packing.gather(np.arange(packing.rows)), plain(shards, rows, seq_len))
    found = Counter((start, size) for row in rows for _, start, size in row)
    for first, length in zip(shards.offsets.tolist(), lengths, strict=False):
        if 2 <= length <= seq_len + 1:
            assert found[first, length - 1] == 1
    assert packing.divided == sum(length - 1 > seq_len for length in lengths)


@settings(max_examples=200)
@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_best_fit_is_that_of_a_plain_search(sizes):
    rows = best_fit(np.array(sizes), 50)
    room: list[int] = []
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [r for r in room if r >= sizes[piece]]
        if fitting:
            room[room.index(min(fitting))] -= sizes[piece]
        else:
            room.append(50 - sizes[piece])
    left = [50 - sum(s for s, r in zip(sizes, rows, strict=True) if r == row) for row in range(max(rows) + 1)]
    assert sorted(left) == sorted(room)


@pytest.mark.parametrize("packing", ["stream", "fit"])
def test_negative_rows_are_padding(packing):
    shards = shards_of([9, 5, 12], masked=False)
    batch = PACKINGS[packing](shards, 8).gather(np.array([-1, 0]))
    assert (batch.documents[0] == -1).all() and not batch.loss_mask[0].any() and (batch.tokens[0] == PAD).all()
    same(Batch(**{k: v[1:] for k, v in vars(batch).items()}), PACKINGS[packing](shards, 8).gather(np.array([0])))
