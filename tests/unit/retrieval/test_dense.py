"""Dense search: exact equals brute force, the graph nearly, and fusion is what its definition says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luban.retrieval import mips
from luban.retrieval.dense import Vectors, quantise
from luban.retrieval.fusion import reciprocal_rank, top, zscore_sum
from luban.retrieval.mips import exact_search


def brute(vectors: np.ndarray, queries: np.ndarray, k: int, present: np.ndarray) -> list[list[int]]:
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    scores[:, ~present] = -np.inf
    return [sorted(range(len(vectors)), key=lambda i, row=row: (-row[i], i))[:k] for row in scores]


def test_exact_search_is_brute_force(monkeypatch):
    monkeypatch.setattr(mips, "BLOCK", 7)
    rng = np.random.default_rng()
    vectors = rng.integers(-3, 4, (50, 4)).astype(np.float32)  # whole numbers: many ties, no rounding
    queries = rng.integers(-3, 4, (5, 4)).astype(np.float32)
    present = rng.random(50) < 0.7
    scores, places = exact_search(
        torch.from_numpy(vectors), torch.from_numpy(queries), 12, present=torch.from_numpy(present)
    )
    expected = brute(vectors, queries, 50, present)
    for row in range(5):
        true = queries[row] @ vectors[expected[row][:12]].T
        assert scores[row].tolist() == true.tolist()
        assert (queries[row] @ vectors[places[row]].T).tolist() == scores[row].tolist()
        assert len(set(places[row].tolist())) == 12 and present[places[row]].all()


def test_k_beyond_the_vectors_gives_all_of_them():
    scores, places = exact_search(torch.eye(3), torch.ones(1, 3), 10)
    assert places.tolist() == [[0, 1, 2]] and scores.shape == (1, 3)


def test_eight_bits_are_off_by_half_a_step_at_most(tmp_path):
    rng = np.random.default_rng()
    vectors = rng.standard_normal((40, 16)).astype(np.float32)
    vectors[3] = 0
    rows, scales = quantise(vectors)
    assert rows.dtype == np.int8 and (np.abs(rows * scales[:, None] - vectors) <= scales[:, None] / 2 + 1e-6).all()
    Vectors.save(tmp_path, vectors, "int8")
    opened = Vectors.open(tmp_path)
    query = rng.standard_normal((2, 16)).astype(np.float32)
    scores, places = opened.search(query, 40)
    exact = np.take_along_axis(query @ (rows * scales[:, None]).T, places, 1)
    np.testing.assert_allclose(scores, exact, atol=1e-4)


def test_the_graph_finds_inner_products_of_vectors_of_any_length(tmp_path):
    pytest.importorskip("usearch")
    from luban.retrieval.hnsw import Graph

    rng = np.random.default_rng(0)  # a graph is a heuristic: which vectors it misses depends on the draw
    vectors = rng.standard_normal((600, 12)).astype(np.float32) * rng.lognormal(0, 1, (600, 1)).astype(np.float32)
    queries = rng.standard_normal((20, 12)).astype(np.float32)
    present = rng.random(600) < 0.5

    def inner(query: np.ndarray, places: np.ndarray) -> np.ndarray:
        return vectors[places] @ query

    graph = Graph.empty(12)
    graph.add(np.arange(600), vectors, threads=1)
    graph.save(tmp_path / "graph.usearch")
    found = Graph.open(tmp_path / "graph.usearch").search(queries, 10, present, inner)
    expected = brute(vectors, queries, 10, present)
    hits = [len(set(places.tolist()) & set(best)) for (places, _), best in zip(found, expected, strict=True)]
    assert np.mean(hits) >= 9.5
    assert all(present[places].all() and (np.diff(scores) <= 0).all() for places, scores in found)
    assert len(graph.search(queries[:1], 3, present, inner)[0][0]) == 3


def test_top_breaks_ties_by_place():
    rng = np.random.default_rng()
    for _ in range(50):
        scores = rng.integers(0, 4, 20).astype(float)
        k = int(rng.integers(1, 25))
        places, found = top(scores, k)
        expected = sorted(range(20), key=lambda i, s=scores: (-s[i], i))[:k]
        assert places.tolist() == expected and found.tolist() == scores[expected].tolist()


def test_fusion_by_hand():
    first = (np.array([4, 2, 9]), np.array([3.0, 2.0, 1.0]))
    second = (np.array([9, 7]), np.array([0.5, 0.1]))
    places, scores = reciprocal_rank([first, second], 4)
    assert places.tolist() == [9, 4, 2, 7]
    np.testing.assert_allclose(scores, [1 / 63 + 1 / 61, 1 / 61, 1 / 62, 1 / 62])
    one, two = np.arange(10) / 2, np.zeros(10)
    two[[7, 9]] = 0.1, 0.5
    places, scores = zscore_sum([first, second], [lambda p: one[p], lambda p: two[p]], 4)
    by_hand = {p: (one[p] - 2) / np.std([3, 2, 1]) + (two[p] - 0.3) / np.std([0.5, 0.1]) for p in (2, 4, 7, 9)}
    assert places.tolist() == sorted(by_hand, key=lambda p: -by_hand[p])
    np.testing.assert_allclose(scores, sorted(by_hand.values(), reverse=True))
