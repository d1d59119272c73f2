"""How far two annotators agree, and two rankings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np


def agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Fraction of items with the same label. Raises ValueError for no items, or lists of other lengths."""
    if not first or len(first) != len(second):
        raise ValueError(f"agreement needs two lists of as many labels, {len(first)} and {len(second)} given")
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement beyond chance, (p - e) ÷ (1 - e), e that of independent annotators with the same frequencies (Cohen 1960).
    1 where both always give the same single label. Raises ValueError as `agreement` does."""
    observed = agreement(first, second)
    a, b = Counter(first), Counter(second)
    chance = sum(a[label] * b[label] for label in a) / len(first) ** 2
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing the mean of theirs (Spearman 1904). NaN where one is constant.
    Raises ValueError for fewer than two values, or lists of other lengths."""
    if len(first) < 2 or len(first) != len(second):
        raise ValueError(f"a rank correlation needs two lists of as many values, {len(first)} and {len(second)} given")
    a, b = (_ranks(np.asarray(each, dtype=np.float64)) for each in (first, second))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / scale) if scale else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[places]
