"""Prefix LM, blank infilling, BART's noises, span corruption: each against its definition."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from training_data import tensors

from luban import build_model
from luban.core.errors import ConfigError, DataError
from luban.data.collate.blank import fill_blanks
from luban.data.collate.noise import (
    DocumentRotation,
    SentencePermutation,
    TextInfilling,
    TokenDeletion,
    TokenMasking,
)
from luban.data.collate.rows import poisson_spans
from luban.data.collate.span import corrupt, random_parts
from luban.data.collate.special_tokens import SpecialTokens
from luban.data.shards import Shards
from luban.kernels.attention_mask import AttentionMask
from luban.models.spec import uniform
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.none import NoPosition
from luban.objectives.blank import BlankInfilling
from luban.objectives.denoising import Denoising
from luban.objectives.prefix import PrefixLM
from luban.objectives.span import SpanCorruption


def seen(segments: list[int]) -> list[list[int]]:
    visible = AttentionMask(
        queries=len(segments),
        keys=len(segments),
        causal=True,
        device=torch.device("cpu"),
        prefix=torch.tensor([segments]) == 0,
    )
    return visible.dense()[0, 0].int().tolist()


def test_blank_infilling_mask_equals_the_six_token_case_by_hand():
    """Text x1 … x6 with blanks x3 and x5 x6 (Du et al. 2022, figure 2), the second written first."""
    row = fill_blanks(np.array([1, 2, 3, 4, 5, 6]), [(2, 3), (4, 6)], [1, 0], mask=90, start=91, stop=92)
    assert row.tokens == [1, 2, 90, 4, 90, 91, 5, 6, 91, 3]
    assert row.targets[5:] == [5, 6, 92, 3, 92]
    assert row.trained == [False] * 5 + [True] * 5
    assert row.text == [0, 1, 2, 3, 4, 4, 4, 4, 2, 2]
    assert row.block == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]
    assert seen([0] * 5 + [1] * 5) == [
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_a_blanks_text_never_moves_the_logits_of_those_before_it():
    rng = np.random.default_rng()
    model = build_model(uniform(vocab_size=100, width=24, layers=2, mixer=Grouped(heads=3), position=NoPosition()))
    text = rng.integers(10, 90, 30)
    spans = poisson_spans(rng, 30, 9, 3.0, 8)
    order = rng.permutation(len(spans)).tolist()
    row = fill_blanks(text, spans, order, mask=90, start=91, stop=92)
    segments = torch.tensor([[int(t) for t in row.trained]])
    before = model(torch.tensor([row.tokens]), segments=segments)
    begin = row.trained.index(True)
    for which in order:
        size = spans[which][1] - spans[which][0] + 1
        changed = list(row.tokens)
        changed[begin + 1 : begin + size] = [(t + 1) % 90 for t in changed[begin + 1 : begin + size]]
        after = model(torch.tensor([changed]), segments=segments)
        torch.testing.assert_close(after[0, : begin + 1], before[0, : begin + 1], atol=0, rtol=0)
        assert (after[0, begin + 1 : begin + size] - before[0, begin + 1 : begin + size]).abs().max() > 1e-6
        begin += size


def test_blanks_come_to_their_share_and_give_the_text_back(shards_path):
    shards = Shards.open(shards_path)
    blanks = BlankInfilling().examples(shards, seq_len=96, seed=random.randrange(99), packing="fit")
    read = blanked = 0
    for epoch in range(30):
        for number in range(blanks.rows):
            row, text = blanks.row(number, epoch), blanks.piece(number).tolist()
            answers, stop, start = {}, blanks.special["stop"], blanks.special["start"]
            for token, target, trained, slot in zip(row.tokens, row.targets, row.trained, row.text, strict=True):
                if trained and token == start:
                    answers[slot] = []
                if trained and target != stop:
                    answers[slot].append(target)
            rebuilt = []
            for slot, token in enumerate(row.tokens[: row.trained.index(True)]):
                rebuilt += answers.get(slot, [token])
            assert rebuilt == text
            read += len(text)
            blanked += sum(map(len, answers.values()))
    assert blanked / read == pytest.approx(0.15, abs=0.003)


def test_prefixes_are_seen_whole_and_only_what_follows_is_trained(shards_path):
    shards = Shards.open(shards_path)
    batch = PrefixLM().examples(shards, seq_len=64, seed=3, packing="fit").gather(np.arange(4), np.zeros(4, int))
    for i in range(4):
        for document in range(batch.documents[i].max() + 1):
            here = batch.documents[i] == document
            segments, trained = batch.segments[i][here], batch.loss_mask[i][here]
            given = int((segments == 0).sum())
            assert (segments[:given] == 0).all() and given >= 1
            assert not trained[: given - 1].any() and trained[given - 1 :].all()
    model = build_model(uniform(vocab_size=shards.vocab_size, width=24, layers=2, mixer=Grouped(heads=3)))
    tokens, documents, positions, segments = (
        tensors(batch)[n] for n in ("tokens", "documents", "positions", "segments")
    )
    before = model(tokens, documents=documents, positions=positions, segments=segments)
    changed = torch.where((segments == 1) & (documents >= 0), (tokens + 1) % shards.vocab_size, tokens)
    after = model(changed, documents=documents, positions=positions, segments=segments)
    torch.testing.assert_close(after[(segments == 0)], before[(segments == 0)], atol=0, rtol=0)
    first = int((documents[0] == 0).sum()) - 1
    given = int(((segments[0] == 0) & (documents[0] == 0)).sum())
    if 1 < given <= first:  # the first token of a prefix sees its last
        other = tokens.clone()
        other[0, given - 1] = (other[0, given - 1] + 1) % shards.vocab_size
        moved = model(other, documents=documents, positions=positions, segments=segments)
        assert (moved[0, 0] - before[0, 0]).abs().max() > 1e-6


def texts(count: int, size: int = 200) -> list[np.ndarray]:
    rng = np.random.default_rng()
    return [rng.integers(10, 110, size) for _ in range(count)]


def test_bart_noises_by_their_definitions(marks):
    rng = np.random.default_rng()
    shares = {"mask": [], "delete": []}
    for text in texts(300):
        masked = TokenMasking()(rng, text, marks)
        assert len(masked) == len(text) and ((masked == text) | (masked == 3)).all()
        shares["mask"].append((masked == 3).mean())
        deleted = TokenDeletion()(rng, text, marks)
        remaining = iter(text.tolist())
        assert all(token in remaining for token in deleted.tolist())  # a subsequence
        shares["delete"].append(1 - len(deleted) / len(text))
        turned = DocumentRotation()(rng, text, marks).tolist()
        assert any(turned == np.roll(text, -i).tolist() for i in range(len(text)))
        text[-1] = 10  # which ends a sentence
        moved = SentencePermutation()(rng, text, marks)
        assert sorted(sentences(moved, marks)) == sorted(sentences(text, marks))
    assert np.mean(shares["mask"]) == pytest.approx(0.3, abs=0.003)
    assert np.mean(shares["delete"]) == pytest.approx(0.3, abs=0.003)


def sentences(text: np.ndarray, marks: SpecialTokens) -> list[list[int]]:
    """By a plain loop."""
    found: list[list[int]] = [[]]
    for token in text.tolist():
        found[-1].append(token)
        if marks.ends_sentence[token]:
            found.append([])
    return found


def test_text_infilling_is_poisson_and_inserts_where_spans_are_empty(marks):
    rng = np.random.default_rng()
    removed, masks, runs_longer, inserted, size = 0, 0, 0, 0, 0
    for text in texts(60, size=2000):
        corrupted = TextInfilling()(rng, text, marks)
        kept = corrupted[corrupted != 3]
        remaining = iter(text.tolist())
        assert all(token in remaining for token in kept.tolist())
        removed, size = removed + len(text) - len(kept), size + len(text)
        masks += int((corrupted == 3).sum())
        runs_longer += int(((corrupted[1:] == 3) & (corrupted[:-1] == 3)).sum())
    assert removed / size == pytest.approx(0.3, abs=0.003)
    assert removed / masks == pytest.approx(3.0, abs=0.1)  # the mean of Poisson(3); the last span of a text is cut
    assert runs_longer == 0
    distinct = np.arange(10, 110)
    for _ in range(200):  # with every token distinct, a mask between neighbours is an insertion
        corrupted = TextInfilling()(rng, distinct, marks).tolist()
        places = [i for i, token in enumerate(corrupted) if token == 3 and 0 < i < len(corrupted) - 1]
        inserted += sum(corrupted[i + 1] == corrupted[i - 1] + 1 for i in places)
    assert inserted / 200 == pytest.approx(100 * 0.3 / 3 * np.exp(-3), rel=0.4)


def test_denoising_rows_give_the_text_back(shards_path):
    shards = Shards.open(shards_path)
    made = Denoising().examples(shards, seq_len=64, seed=1, packing="fit")
    batch = made.gather(np.array([0, 3, -1]))
    marks = SpecialTokens.of(shards)
    for i, row in enumerate((0, 3)):
        size = int(batch.loss_mask[i].sum())
        assert batch.targets[i, :size].tolist() == [marks.begin, *made.piece(row).tolist(), marks.end]
        assert batch.tokens[i, :size].tolist() == [marks.end, *batch.targets[i, : size - 1].tolist()]
        source = batch.source[i][batch.source_mask[i]]
        assert source[0] == marks.begin and source[-1] == marks.end
    assert not batch.loss_mask[2].any() and not batch.source_mask[2].any()


def test_span_corruption_equals_the_papers_figure():
    """Thank you <for inviting> me to your party <last> week (Raffel et al. 2020, figure 2)."""
    text = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week", "."]
    source, target = corrupt(text, [2, 4], [2, 1], first_sentinel=0)[0], None
    source, target = corrupt([*range(100, 108), 108], [2, 4], [2, 1], first_sentinel=500)
    assert source == [100, 101, 500, 104, 105, 106, 107, 501]
    assert target == [500, 102, 103, 501, 108, 502]


def test_span_corruption_shares_and_inverse(shards_path):
    shards = Shards.open(shards_path)
    config = SpanCorruption()
    made = config.examples(shards, seq_len=64, seed=random.randrange(99), packing="fit")
    read = inside = spans = 0
    for epoch in range(5):
        for number in range(made.rows):
            source, target = made.row(number, epoch)
            answers: dict[int, list[int]] = {}
            for token in target:
                if token >= shards.vocab_size:
                    answers[token] = []
                else:
                    answers[list(answers)[-1]].append(token)
            rebuilt = [t for token in source for t in (answers.get(token, [token]))]
            assert rebuilt == made.piece(number).tolist()
            read, inside = read + len(rebuilt), inside + sum(map(len, answers.values()))
            spans += len(answers) - 1
    assert inside / read == pytest.approx(0.15, abs=0.01)  # rounded row by row, as T5 does
    assert inside / spans == pytest.approx(3.0, abs=0.3)
    with pytest.raises(DataError, match=r"need 4 sentinels, and objective\.sentinels is 3"):
        SpanCorruption(sentinels=3).examples(shards, seq_len=64, seed=0, packing="fit")


def test_random_parts_are_even_over_all_ways():
    rng = np.random.default_rng()
    found: dict[tuple[int, ...], int] = {}
    for _ in range(6000):
        parts = tuple(random_parts(rng, 5, 3))
        found[parts] = found.get(parts, 0) + 1
    assert len(found) == 6 and all(sum(parts) == 5 and min(parts) >= 1 for parts in found)
    assert all(n == pytest.approx(1000, rel=0.2) for n in found.values())


@pytest.mark.parametrize("noise", [TokenDeletion, TokenMasking, TextInfilling])
@pytest.mark.parametrize("then", [TokenDeletion, TextInfilling, SentencePermutation, DocumentRotation])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_noises_on_noises_of_very_short_texts(marks, noise, then, size):
    """What one leaves, though it be nothing, is a text for the next."""
    chain = noise(rate=0.99, then=then())
    for _ in range(20):
        text = np.random.default_rng().integers(10, 110, size)
        corrupted = chain(np.random.default_rng(), text, marks)
        assert corrupted.dtype == text.dtype and set(corrupted.tolist()) <= {*text.tolist(), 3}


def test_spans_of_no_length_are_refused():
    with pytest.raises(ConfigError, match="mean_span must be positive"):
        TextInfilling(mean_span=0.0)


@pytest.mark.parametrize("seq_len", [4, 5, 8, 13, 64])
@pytest.mark.parametrize(("rate", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.9, 1.0), (0.95, 50.0)])
def test_targets_of_span_corruption_fit_into_a_row_too(shards_path, seq_len, rate, mean_span):
    rows = SpanCorruption(rate=rate, mean_span=mean_span).examples(
        Shards.open(shards_path), seq_len=seq_len, seed=3, packing="fit"
    )
    batch = rows.gather(np.arange(min(rows.rows, 50)))
    assert batch.tokens.shape[1] <= seq_len and batch.source.shape[1] == seq_len
    assert batch.loss_mask.any(1).all() and batch.source_mask.any(1).all()


@pytest.mark.parametrize("seq_len", range(4, 15))
def test_every_row_of_blank_infilling_has_a_blank(shards_path, seq_len):
    rows = BlankInfilling().examples(Shards.open(shards_path), seq_len=seq_len, seed=3, packing="fit")
    assert rows.gather(np.arange(min(rows.rows, 100))).loss_mask.any(1).all()
