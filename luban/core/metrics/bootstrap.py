"""Percentile bootstrap intervals of means (Efron 1979)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luban.core.seeding import generator

RESAMPLES = 2000


def interval(scores: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The interval that holds the mean of resampled scores with probability `level`; the same every time for the same scores.

    For the difference of two systems on the same items give the differences item by item.

    Raises ValueError for no scores.
    """
    values = np.asarray(scores, dtype=np.float64)
    if not len(values):
        raise ValueError("an interval needs at least one score")
    rng = generator(0, "bootstrap")
    means = [values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
