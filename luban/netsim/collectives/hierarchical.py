"""All-reduce in levels: inside groups of G ranks, across the S groups, inside again.

2(G − 1)·alpha₁ + 2(G − 1)/G·M/B₁ + 2(S − 1)·alpha₂ + 2(S − 1)/S·M/(G·B₂), if each rank has a port of its own towards other groups.
On a torus the dimensions are the levels.
"""

from __future__ import annotations

from collections.abc import Sequence

from luban.core.errors import ConfigError
from luban.netsim.collectives.schedule import Schedule, pieces


def hierarchical_all_reduce(schedule: Schedule, size: int, group: int) -> None:
    """`size` bytes on each rank, summed on all; ranks 0 to group − 1 are the first group, and so on."""
    if group < 1 or schedule.ranks % group:
        raise ConfigError(f"groups of {group} ranks don't divide {schedule.ranks} ranks")
    _by_levels(schedule, size, (group, schedule.ranks // group))


def torus_all_reduce(schedule: Schedule, size: int, shape: Sequence[int], at_once: int = 1) -> None:
    """Along z, y and x of a torus; rank (x·Y + y)·Z + z. With `at_once` 3, thirds of the data start along different dimensions,
    with 6 half of each goes round the other way."""
    if len(shape) != 3 or schedule.ranks != shape[0] * shape[1] * shape[2]:
        raise ConfigError(f"a torus of {' × '.join(map(str, shape))} nodes doesn't have {schedule.ranks} ranks")
    if at_once not in (1, 3, 6):
        raise ConfigError(f"a torus uses 1, 3 or 6 ports of a node at once, not {at_once}")
    x, y, z = shape
    levels = [(z, 1), (y, z), (x, y * z)]
    for i, part in enumerate(pieces(size, at_once)):
        turned = levels[i % 3 :] + levels[: i % 3]
        _rings(schedule, part, turned, -1 if i >= 3 else 1)


def _by_levels(schedule: Schedule, size: int, sizes: Sequence[int]) -> None:
    stride, levels = 1, []
    for n in sizes:
        levels.append((n, stride))
        stride *= n
    _rings(schedule, size, levels, 1)


def _rings(schedule: Schedule, size: int, levels: Sequence[tuple[int, int]], direction: int) -> None:
    """Reduce-scatter level by level, then all-gather backwards. A level is (ranks in its rings, distance between them)."""
    last: list[int | None] = [None] * schedule.ranks
    stages, held = [], float(size)
    for n, stride in levels:
        held /= n
        stages.append((n, stride, held))
    for n, stride, part in [*stages, *stages[::-1]]:
        for _ in range(n - 1):
            _step(schedule, n, stride, direction, max(1, round(part)), last)


def _step(schedule: Schedule, n: int, stride: int, direction: int, part: int, last: list[int | None]) -> None:
    """Every rank sends one piece to its neighbour in the ring of this level."""
    neighbour = [
        rank + ((rank // stride + direction) % n - rank // stride % n) * stride for rank in range(schedule.ranks)
    ]
    sent = [schedule.send(rank, neighbour[rank], part, [last[rank]]) for rank in range(schedule.ranks)]
    for rank in range(schedule.ranks):
        last[neighbour[rank]] = sent[rank]
