"""Stages and the submeshes they run on: Alpa's dynamic program (Zheng et al. 2022, section 5.2).

B micro-batches through S stages of t_1 … t_S seconds take T = Σ t_i + (B − 1)·max t_i. For a bound t_max on every stage,

    F(s, k, d) = min over j, submesh of n devices:  t(k … j − 1, n, s) + F(s − 1, j, d − n),   F(0, K, 0) = 0

is the least Σ t_i of s stages over the groups of layers from k on with exactly d devices; t may depend on s, the stages from here to the
last, as that many micro-batches' activations are kept. t_max runs over the stages' times; those that can't beat the best found are
skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import inf

import numpy as np

from luban.core.errors import UnsupportedError

# (first group, past the last, number of the submesh, stages from here on) → seconds of a micro-batch; inf: doesn't fit
StageTime = Callable[[int, int, int, int], float]


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A division of the layers."""

    cuts: tuple[tuple[int, int, int], ...]  # of each stage: first group, past the last, number of its submesh
    times: tuple[float, ...]  # seconds of a micro-batch in each
    seconds: float  # T


def submeshes(nodes: int, per_node: int) -> list[int]:
    """Devices of the submeshes that cover a cluster without gaps: 1 × 2^k inside of a node, and n whole nodes."""
    small = []
    size = 1
    while size < per_node:
        small.append(size)
        size *= 2
    return [*small, *(n * per_node for n in range(1, nodes + 1))]


def best_stages(
    groups: int,
    devices: int,
    sizes: Sequence[int],
    micro_batches: int,
    time: StageTime,
    *,
    gap: float = 0.0,
    most_stages: int | None = None,
) -> Stages:
    """The division with the least T.

    Args:
        groups: K groups of consecutive layers.
        sizes: devices of each kind of submesh.
        gap: relative step between values of t_max; 0: every value, for the exact optimum.

    Raises:
        UnsupportedError: no division fits.
    """
    most = min(groups, devices, most_stages or groups)
    table = _table(groups, sizes, most, time)
    values = np.unique(table[np.isfinite(table)])
    best: tuple[float, float, int] | None = None  # T, t_max, stages
    last = 0.0
    for bound in values.tolist():
        if best is not None and (micro_batches - 1) * bound >= best[0]:
            break
        if bound < last * (1 + gap):
            continue
        last = bound
        totals = _totals(np.where(table <= bound, table, inf), groups, devices, sizes, most)
        for stages in range(1, most + 1):
            total = totals[stages][0][devices] + (micro_batches - 1) * bound
            if total < inf and (best is None or total < best[0]):
                best = (total, bound, stages)
    if best is None:
        raise UnsupportedError(
            f"no division of {groups} groups of layers over {devices} devices fits into their memory"
        )
    return _unrolled(table, best[1], best[2], groups, devices, sizes, most, micro_batches)


def _table(groups: int, sizes: Sequence[int], most: int, time: StageTime) -> np.ndarray:
    """t[s, k, j, submesh], inf where it isn't a stage."""
    table = np.full((most + 1, groups, groups + 1, len(sizes)), inf)
    for s, k in product(range(1, most + 1), range(groups)):
        for j, number in product(range(k + 1, groups + 1), range(len(sizes))):
            table[s, k, j, number] = time(k, j, number, s)
    return table


def _totals(table: np.ndarray, groups: int, devices: int, sizes: Sequence[int], most: int) -> list[np.ndarray]:
    """F[s][k, d]."""
    start = np.full((groups + 1, devices + 1), inf)
    start[groups, 0] = 0.0
    found = [start]
    usable = [(number, size) for number, size in enumerate(sizes) if size <= devices]
    for s in range(1, most + 1):
        here, before = np.full((groups + 1, devices + 1), inf), found[-1]
        for number, size in usable:
            shifted = np.full((groups + 1, devices + 1), inf)
            shifted[:, size:] = before[:, : devices + 1 - size]
            # over j: t[k, j] + F[s − 1][j, d − n]
            for k in range(groups):
                rows = table[s, k, k + 1 :, number]
                if np.isfinite(rows).any():
                    np.minimum(here[k], (rows[:, None] + shifted[k + 1 :]).min(axis=0), out=here[k])
        found.append(here)
    return found


def _unrolled(
    table: np.ndarray,
    bound: float,
    stages: int,
    groups: int,
    devices: int,
    sizes: Sequence[int],
    most: int,
    micro_batches: int,
) -> Stages:
    """The stages behind a value of F."""
    within = np.where(table <= bound, table, inf)
    totals = _totals(within, groups, devices, sizes, most)
    cuts, times, k, left = [], [], 0, devices
    for s in range(stages, 0, -1):
        options = [
            (within[s, k, j, number] + totals[s - 1][j, left - size], j, number)
            for j in range(k + 1, groups + 1)
            for number, size in enumerate(sizes)
            if size <= left
        ]
        _, j, number = min(options)
        cuts.append((k, j, number))
        times.append(float(within[s, k, j, number]))
        k, left = j, left - sizes[number]
    return Stages(cuts=tuple(cuts), times=tuple(times), seconds=sum(times) + (micro_batches - 1) * max(times))


def exhaustive(groups: int, devices: int, sizes: Sequence[int], micro_batches: int, time: StageTime) -> float:
    """The least T by trying every division: for tests, and for a handful of groups."""

    def divisions(k: int, left: int):
        if k == groups:
            if left == 0:
                yield ()
            return
        for j in range(k + 1, groups + 1):
            for number, size in enumerate(sizes):
                if size <= left:
                    for rest in divisions(j, left - size):
                        yield ((k, j, number), *rest)

    best = inf
    for cuts in divisions(0, devices):
        times = [time(k, j, number, len(cuts) - at) for at, (k, j, number) in enumerate(cuts)]
        best = min(best, sum(times) + (micro_batches - 1) * max(times))
    return best
