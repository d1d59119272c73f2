"""BM25 against the formula written out, and against bm25s."""

from __future__ import annotations

import math
import random
from collections import Counter

import numpy as np
import pytest

from luban.retrieval.bm25 import BM25, K1, B, Postings
from luban.retrieval.terms import terms

LETTERS = "abcdefghijklmnop"


def draw(rng: random.Random, texts: int) -> list[str]:
    return [" ".join(rng.choices(LETTERS, weights=range(1, 17), k=rng.randrange(1, 30))) for _ in range(texts)]


def by_hand(texts: list[str], query: str) -> list[float]:
    held = [Counter(text.split()) for text in texts]
    mean = sum(sum(h.values()) for h in held) / len(held)
    scores = []
    for document in held:
        score = 0.0
        for term in query.split():
            n = sum(term in other for other in held)
            f = document[term]
            weight = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            score += weight * f / (f + K1 * (1 - B + B * sum(document.values()) / mean))
        scores.append(score)
    return scores


def postings_of(texts: list[str]) -> Postings:
    return Postings.build([terms(text) for text in texts])


def everything(postings: Postings) -> tuple[Postings, np.ndarray]:
    return postings, np.ones(len(postings.lengths), dtype=bool)


def test_scores_are_the_formula_written_out():
    rng = random.Random()
    for _ in range(10):
        texts, query = draw(rng, 20), " ".join(rng.choices(LETTERS + "z", k=4))
        found = BM25([everything(postings_of(texts))]).scores(terms(query))
        np.testing.assert_allclose(found, by_hand(texts, query), rtol=0, atol=1e-12)


def test_scores_are_those_of_bm25s():
    bm25s = pytest.importorskip("bm25s")
    rng = random.Random()
    texts, query = draw(rng, 50), " ".join(rng.choices(LETTERS, k=5))
    peer = bm25s.BM25(method="lucene", k1=K1, b=B, dtype="float64")
    peer.index([text.split() for text in texts], show_progress=False)
    found = BM25([everything(postings_of(texts))]).scores(terms(query))
    np.testing.assert_allclose(found, peer.get_scores(query.split()), rtol=0, atol=1e-6)


def test_segments_and_removed_passages_score_as_an_index_built_anew(tmp_path):
    rng = random.Random()
    texts, query = draw(rng, 40), " ".join(rng.choices(LETTERS, k=4))
    segments = [postings_of(texts[:15]), postings_of(texts[15:])]
    present = np.array([rng.random() < 0.6 for _ in texts])
    present[0] = True
    for number, segment in enumerate(segments):
        (tmp_path / str(number)).mkdir()
        segment.save(tmp_path / str(number))
    opened = [Postings.open(tmp_path / str(number)) for number in range(2)]
    found = BM25([(opened[0], present[:15]), (opened[1], present[15:])]).scores(terms(query))
    left = [text for text, there in zip(texts, present, strict=True) if there]
    np.testing.assert_allclose(found[present], by_hand(left, query), rtol=0, atol=1e-12)
    assert not found[~present].any()


def test_an_unknown_term_and_an_empty_segment_score_nothing(tmp_path):
    empty = Postings.build([terms("...")])
    empty.save(tmp_path)
    bm25 = BM25([everything(Postings.open(tmp_path))])
    assert bm25.scores(terms("word")).tolist() == [0.0]


def test_chinese_is_segmented_by_pairs_of_signs():
    found = terms("中国人 abc")
    assert len(found) == 6  # three signs, a word, two pairs
    assert set(terms("中国")) <= set(found) and not set(terms("国中")) <= set(found)
    assert len(terms("中 国")) == 2 and len(set(terms("Café CAFÉ"))) == 1
