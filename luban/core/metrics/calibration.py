"""Whether probabilities are as often right as they say."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike

BINS = 10  # between 0.5 and 1


class Bin(TypedDict):
    """Predictions of similar confidence."""

    predicted: float  # mean probability
    right: float  # fraction right
    pairs: int


def calibration(confidence: ArrayLike, right: ArrayLike) -> tuple[list[Bin], float]:
    """(bins that aren't empty, expected calibration error: the mean over predictions of |predicted − right| of their bin; Naeini et
    al. 2015).

    Args:
        confidence: (N,) probability of the alternative that is held to be likelier, from 0.5 to 1.
        right: (N,) 1 where that was the right one, 0.5 for a tie.

    Raises ValueError for no predictions, or lists of other lengths.
    """
    p, found = np.asarray(confidence, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if not len(p) or p.shape != found.shape:
        raise ValueError(f"calibration needs two lists of as many numbers, {len(p)} and {len(found)} given")
    bins = np.minimum(((p - 0.5) * 2 * BINS).astype(int), BINS - 1)
    table: list[Bin] = [
        {"predicted": float(p[bins == b].mean()), "right": float(found[bins == b].mean()), "pairs": int(n)}
        for b in range(BINS)
        if (n := (bins == b).sum())
    ]
    return table, sum(row["pairs"] * abs(row["predicted"] - row["right"]) for row in table) / len(p)
