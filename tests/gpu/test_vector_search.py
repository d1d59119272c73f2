"""Exact search on a GPU finds what brute force finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luban.retrieval.dense import Vectors, quantise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("queries", [1, 3, 300])
def test_the_best_are_those_of_brute_force(bits, queries, monkeypatch):
    monkeypatch.setattr("luban.retrieval.mips.LARGEST", 1 << 18)  # several blocks
    rng = np.random.default_rng()
    rows, asked = (rng.standard_normal((count, 48)).astype(np.float32) for count in (50_000, queries))
    present = rng.random(len(rows)) < 0.9
    vectors = Vectors(rows) if bits == 32 else Vectors(*quantise(rows))
    scores, places = vectors.search(asked, 10, present, "cuda")
    every = np.where(present, asked.astype(np.float64) @ vectors.floats(slice(None)).astype(np.float64).T, -np.inf)
    np.testing.assert_allclose(scores, -np.sort(-every, 1)[:, :10], atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(every, places, 1), scores, atol=1e-4)
    assert torch.cuda.memory_allocated() >= vectors.rows.nbytes  # the vectors stay there
