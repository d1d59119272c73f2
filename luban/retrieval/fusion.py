"""Fusion of a lexical and a dense ranking into one.

A ranking is (places, scores) of a query's best passages, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Ranking = tuple[np.ndarray, np.ndarray]  # (n,) int64 places, (n,) scores
Fusion = Literal["zscore", "reciprocal"]
RANK_CONSTANT = 60  # of reciprocal rank fusion (Cormack et al. 2009)


def top(scores: np.ndarray, k: int, places: np.ndarray | None = None) -> Ranking:
    """The k largest of (n,) scores, largest first, equal ones by place. `places` (n,) names them; None: 0, 1, …"""
    places = np.arange(len(scores)) if places is None else places
    if k < len(scores):
        least = np.partition(scores, len(scores) - k)[len(scores) - k]
        kept = np.flatnonzero(scores >= least)  # ties at the end included, so that the order of places decides
        scores, places = scores[kept], places[kept]
    order = np.lexsort((places, -scores))[:k]
    return places[order], scores[order]


def reciprocal_rank(rankings: Sequence[Ranking], k: int) -> Ranking:
    """Sum over rankings of 1 / (60 + rank); a passage that one doesn't hold gets nothing from it."""
    union = np.unique(np.concatenate([places for places, _ in rankings]))
    total = np.zeros(len(union))
    for places, _ in rankings:
        total[np.searchsorted(union, places)] += 1 / (RANK_CONSTANT + 1 + np.arange(len(places)))
    return top(total, k, union)


def zscore_sum(rankings: Sequence[Ranking], scorers: Sequence[Callable[[np.ndarray], np.ndarray]], k: int) -> Ranking:
    """Sum over rankings of (score - mean) / deviation, mean and standard deviation being those of the ranking's own scores.

    Args:
        scorers: for each ranking, places (n,) → scores (n,), for passages that only the others hold.
    """
    union = np.unique(np.concatenate([places for places, _ in rankings]))
    total = np.zeros(len(union))
    for (_, scores), scorer in zip(rankings, scorers, strict=True):
        deviation = scores.std() if len(scores) else 0.0
        if deviation > 0:
            total += (scorer(union) - scores.mean()) / deviation
    return top(total, k, union)
