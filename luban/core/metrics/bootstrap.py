"""Percentile bootstrap intervals (Efron 1979), and tests of the difference of two systems on the same items."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike

from luban.core.seeding import generator

RESAMPLES = 2000
TOGETHER = 1 << 22  # numbers drawn at once


def resamples(n: int, count: int = RESAMPLES) -> Iterator[np.ndarray]:
    """(rows, n) int64 places of n items drawn with replacement, `count` rows in all; the same every time."""
    rng = generator(0, "bootstrap")
    rows = max(1, TOGETHER // n)
    for start in range(0, count, rows):
        yield rng.integers(0, n, (min(rows, count - start), n))


def interval(scores: Sequence[float], *, level: float = 0.95, resamples: int = RESAMPLES) -> tuple[float, float]:
    """The interval that holds the mean of resampled scores with probability `level`; the same every time for the same scores.

    For the difference of two systems on the same items give the differences item by item.

    Raises ValueError for no scores.
    """
    return statistic_interval([scores], lambda columns: columns[0].mean(1), level=level, count=resamples)


def statistic_interval(
    columns: Sequence[ArrayLike],
    statistic: Callable[[list[np.ndarray]], np.ndarray],
    *,
    level: float = 0.95,
    count: int = RESAMPLES,
) -> tuple[float, float]:
    """`interval` of any statistic of items.

    Args:
        columns: each (items,) numbers, or (items, m).
        statistic: given each column's resampled rows, (rows, items) or (rows, items, m), its (rows,) values.

    Raises ValueError for no items.
    """
    values = [np.asarray(column, dtype=np.float64) for column in columns]
    if not len(values[0]):
        raise ValueError("an interval needs at least one score")
    found = np.concatenate(
        [statistic([column[places] for column in values]) for places in resamples(len(values[0]), count)]
    )
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def ratio_interval(above: ArrayLike, below: ArrayLike, *, level: float = 0.95) -> tuple[float, float]:
    """`interval` of Σ above ÷ Σ below, items resampled together (bits per byte over documents)."""
    return statistic_interval([above, below], lambda c: c[0].sum(1) / c[1].sum(1), level=level)


def sign_flip_p_value(differences: Sequence[float], *, flips: int = 10_000) -> float:
    """Two-sided p-value of a mean of paired differences: how often random signs give a mean as large (Fisher 1935).

    Every combination of signs is tried where there are at most 13 differences that aren't 0; otherwise `flips` random
    ones, the observed one among them, so that the value is never 0.

    Raises ValueError for no differences.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values):
        raise ValueError("a test needs at least one pair")
    values = values[values != 0]
    if not len(values):
        return 1.0
    observed = abs(values.sum()) * (1 - 1e-12)
    if len(values) <= 13:
        signs = 1 - 2 * ((np.arange(1 << len(values))[:, None] >> np.arange(len(values))) & 1)
        return float(np.mean(np.abs(signs @ values) >= observed))
    rng, reached = generator(0, "sign flips"), 1
    rows = max(1, TOGETHER // len(values))
    for start in range(0, flips - 1, rows):
        signs = 1 - 2 * rng.integers(0, 2, (min(rows, flips - 1 - start), len(values)), dtype=np.int8)
        reached += int(np.sum(np.abs(signs @ values) >= observed))
    return reached / flips
