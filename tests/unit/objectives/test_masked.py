"""Masking, whole words, n-grams and pairs: shares, exactness, reproducibility."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from drawn import drawn
from training_data import tensors

from luban import build_model
from luban.data.collate.pairing import NextSentence, SentenceOrder
from luban.data.collate.selection import NGrams, Tokens, Words
from luban.data.collate.special_tokens import SpecialTokens
from luban.data.loader import Loader
from luban.data.shards import Shards
from luban.models.encoder_presets import ENCODERS
from luban.models.head.masked_lm import MaskedLM
from luban.models.spec import changed
from luban.nn.feedforward.plain import GELU
from luban.nn.mixer.grouped import Grouped
from luban.objectives.masked import Masked

LENGTH = 512
TOLERANCE = (
    0.003  # over three million tokens: four standard errors and more, so that it fails by chance once in 10,000 runs
)


@pytest.mark.parametrize("selection", drawn([Tokens(), Words(), NGrams()], 1), ids=lambda s: type(s).__name__)
def test_shares_over_three_million_tokens(selection, marks):
    rng = np.random.default_rng()
    masking = Masked(selection=selection).masking(marks, 0)
    read = hidden = masked = stayed = marked = 0
    while read < 3_000_000:
        tokens = rng.integers(0, 110, LENGTH)
        words_only = ~marks.special[tokens]
        after, chosen = masking.hide_row(rng, tokens, words_only)
        assert (after[~chosen] == tokens[~chosen]).all()
        marked += int(chosen[~words_only].sum())
        read += int(words_only.sum())
        hidden += int(chosen.sum())
        masked += int((after[chosen] == 3).sum())
        stayed += int((after[chosen] == tokens[chosen]).sum())
        assert not marks.special[after[chosen & (after != 3)]].any()
    assert marked == 0  # special tokens are never predicted
    assert hidden / read == pytest.approx(0.15, abs=TOLERANCE)
    assert masked / hidden == pytest.approx(0.8, abs=TOLERANCE)
    assert stayed / hidden == pytest.approx(0.1 + 0.1 / 100, abs=TOLERANCE)  # a random token may be the same one


def test_words_are_hidden_whole(marks):
    rng = np.random.default_rng()
    for _ in range(50):
        tokens = rng.integers(10, 110, 60)
        _, chosen = Masked(selection=Words()).masking(marks, 0).hide_row(rng, tokens, np.ones(60, bool))
        starts = marks.word_starts(tokens)
        word = np.cumsum(starts)
        for which in np.unique(word):
            assert len(set(chosen[word == which].tolist())) == 1


def test_ngram_lengths_follow_one_over_n():
    assert NGrams().probabilities() == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    rng = np.random.default_rng()
    counts = np.zeros(4)
    for _ in range(3000):  # one run a text: the budget is met by the first of any length
        chosen = NGrams().choose(rng, np.ones(400, bool), np.ones(400, bool), 3)
        places = np.flatnonzero(chosen)
        counts[int((np.diff(places, prepend=-9) == 1).sum()) + 1 if len(places) else 0] += 1
    assert counts[0] == 0  # 3 words a text: runs of 3, of 2 and 1, or of 1, 1, 1
    assert counts[3] / counts.sum() == pytest.approx(2 / 11 + 2 * 1 / 400, abs=0.04)


def test_dynamic_masks_change_by_epoch_and_static_ones_come_back(shards_path):
    shards = Shards.open(shards_path)
    rows = np.arange(3)
    at = {}
    for name, copies in (("dynamic", 0), ("static", 2)):
        made = Masked(copies=copies).examples(shards, seq_len=64, seed=5, packing="stream")
        at[name] = [made.gather(rows, np.full(3, epoch)).loss_mask for epoch in range(3)]
    assert not (at["dynamic"][0] == at["dynamic"][2]).all()
    assert (at["static"][0] == at["static"][2]).all() and not (at["static"][0] == at["static"][1]).all()
    again = Masked().examples(shards, seq_len=64, seed=5, packing="stream").gather(rows, np.full(3, 2))
    assert (again.loss_mask == at["dynamic"][2]).all()
    other = Masked().examples(shards, seq_len=64, seed=6, packing="stream").gather(rows, np.full(3, 2))
    assert not (other.loss_mask == at["dynamic"][2]).all()


def test_batches_are_a_function_of_seed_and_step(shards_path):
    shards = Shards.open(shards_path)
    made = Masked(pairing=SentenceOrder()).examples(shards, seq_len=48, seed=1, packing="fit")
    loader = Loader(shards, batch_size=4, seq_len=48, seed=1, packing=made)
    ahead = Loader(shards, batch_size=4, seq_len=48, seed=1, packing=made, workers=2).iterate(2)
    for step in (2, 3, 4):
        one, two = loader.batch(step).arrays(), next(ahead).arrays()
        assert one.keys() == two.keys() and all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("pairing", [NextSentence(), SentenceOrder()], ids=lambda p: type(p).__name__)
def test_pairs_are_what_their_class_says(pairing, shards_path):
    shards = Shards.open(shards_path)
    pairs = Masked(pairing=pairing).examples(shards, seq_len=48, seed=random.randrange(99), packing="fit")
    labels = []
    texts = [shards.document(i).tolist() for i in range(shards.documents)]
    for epoch in range(40):
        for row in range(0, pairs.rows, 7):
            one, two, label = pairs.pair(row, epoch)
            labels.append(label)
            piece = pairs.piece(row).tolist()
            if label == 0:
                assert [*one, *two] == piece
            elif isinstance(pairing, SentenceOrder):
                assert [*two, *one] == piece
            else:
                assert piece[: len(one)] == one.tolist()
                home = [i for i, text in enumerate(texts) if _holds(text, two.tolist())]
                assert any(i != pairs.document[row] for i in home)
    assert np.mean(labels) == pytest.approx(0.5, abs=4 * 0.5 / len(labels) ** 0.5)


def _holds(text: list[int], part: list[int]) -> bool:
    return any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))


def test_pair_rows_and_the_loss_weigh_masks_and_pairs_as_means(shards_path):
    shards = Shards.open(shards_path)
    objective = Masked(pairing=SentenceOrder())
    batch = objective.examples(shards, seq_len=48, seed=1, packing="fit").gather(np.array([0, 1, 2, -1]))
    marks = SpecialTokens.of(shards)
    separator = marks.names["<|reserved_1|>"]
    for i in range(3):
        row, segments = batch.targets[i], batch.segments[i]
        real = batch.documents[i] >= 0
        first, last = np.flatnonzero(row == separator)
        assert row[0] == marks.head and last == real.sum() - 1
        assert (segments[: first + 1] == 0).all() and (segments[first + 1 : last + 1] == 1).all()
    assert (batch.documents[3] == -1).all() and batch.weights[3] == 0 and not batch.loss_mask[3].any()
    spec = changed(
        ENCODERS["bert-base"],
        vocab_size=shards.vocab_size,
        width=16,
        layers=1,
        head=MaskedLM(pair=True),
        mixer=Grouped(heads=2, qkv_bias=True, output_bias=True),
        feedforward=GELU(width=32, bias=True),
    )
    model = build_model(spec).double()
    arrays, count = tensors(batch), batch.target_count
    total, metrics = objective.loss(model)(arrays)
    names = ("tokens", "targets", "loss_mask", "documents", "positions", "segments", "labels")
    tokens, targets, chosen, documents, positions, segments, labels = (arrays[name] for name in names)
    logits = model(tokens, documents=documents, positions=positions, segments=segments)
    hidden = model(tokens, documents=documents, positions=positions, segments=segments, output="hidden")
    want = torch.nn.functional.cross_entropy(logits[chosen], targets[chosen])
    torch.testing.assert_close(metrics["token_loss"][0] / metrics["token_loss"][1], want, rtol=1e-5, atol=1e-5)
    want = want + torch.nn.functional.cross_entropy(model.head.pairs(hidden)[:3], labels[:3])
    torch.testing.assert_close(total / count, want, rtol=1e-5, atol=1e-5)
