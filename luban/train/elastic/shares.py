"""Rows of a micro-batch divided among workers by their speed. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

UNEVEN = 1.15  # the fastest over the slowest worker, below which all get the same
SMOOTHING = 0.2  # weight of the newest step in a worker's speed


def equal_bounds(rows: int, workers: int) -> list[int]:
    """Worker r has rows bounds[r] to bounds[r + 1]; where they can't be the same for all, the first have one more."""
    size, longer = divmod(rows, workers)
    return [0, *accumulate(size + (worker < longer) for worker in range(workers))]


def bounds_by_speed(rows: int, speeds: Mapping[int, float], workers: int) -> list[int]:
    """Bounds in proportion to rows a second of each worker by rank, at least one row for each; equal ones while a speed is
    unknown, or where they hardly differ. What is left after rounding down goes to the largest remainders."""
    known = [speeds.get(rank, 0.0) for rank in range(workers)]
    if min(known) <= 0 or max(known) / min(known) < UNEVEN:
        return equal_bounds(rows, workers)
    spare = rows - workers  # after one for each
    wanted = [max(rows * speed / sum(known) - 1, 0.0) for speed in known]
    scale = spare / (sum(wanted) or 1.0)
    exact = [each * scale for each in wanted]
    given = [int(each) for each in exact]
    order = sorted(range(workers), key=lambda rank: (given[rank] - exact[rank], rank))
    for rank in order[: spare - sum(given)]:
        given[rank] += 1
    return [0, *accumulate(1 + each for each in given)]


def smoothed(known: float | None, found: float) -> float:
    """A worker's speed with a new measurement in it."""
    return found if known is None else (1 - SMOOTHING) * known + SMOOTHING * found
