"""Seconds of an iteration by the number of workers: t(w) = fixed + divided / w + growing · w.

`divided` is the work that workers share, `growing` what synchronising costs for each of them. DLRover fits a model of this
form (with more terms, for parameter servers) to what a job measures; its parameters are not negative.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class IterationTime:
    """The three terms, in seconds."""

    fixed: float
    divided: float
    growing: float

    def seconds(self, workers: int) -> float:
        """Of an iteration."""
        return self.fixed + self.divided / workers + self.growing * workers

    def efficiency(self, workers: int) -> float:
        """Speed-up over one worker, over the number of workers."""
        return self.seconds(1) / (self.seconds(workers) * workers)

    def right_size(self, least_efficiency: float, most: int) -> int:
        """The number of workers with the shortest iteration among those that are efficient enough."""
        able = [n for n in range(1, most + 1) if self.efficiency(n) >= least_efficiency]
        return min(able, key=lambda n: (self.seconds(n), n))


def fit(measured: Mapping[int, float]) -> IterationTime:
    """Non-negative least squares of relative errors: the best of the solutions for each set of terms that has no negative one.

    Args:
        measured: number of workers → mean seconds of an iteration. With one number, all work counts as divided.
    """
    sizes = np.array(sorted(measured), dtype=float)
    times = np.array([measured[int(size)] for size in sizes])
    terms = np.stack([np.ones_like(sizes), 1 / sizes, sizes], axis=1) / times[:, None]
    best, least = np.array([0.0, float(times[0] * sizes[0]), 0.0]), np.inf
    for count in range(1, min(3, len(sizes)) + 1):
        for chosen in combinations((1, 0, 2), count):  # of equally good ones, that with divided work
            solution, *_ = np.linalg.lstsq(terms[:, chosen], np.ones_like(sizes), rcond=None)
            error = float(np.square(terms[:, chosen] @ solution - 1).sum())
            if (solution >= 0).all() and error < least * (1 - 1e-9) - 1e-15:
                best, least = np.zeros(3), error
                best[list(chosen)] = solution
    return IterationTime(*(float(value) for value in best))
