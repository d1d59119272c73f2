"""All-reduce, reduce-scatter and all-gather around a ring, in one direction or both at once.

All-reduce takes 2(N − 1) steps of M/N bytes: 2(N − 1)·alpha + 2(N − 1)/N·M/B. Two rings in opposite directions, each with half of
the data, use both directions of full-duplex links.
"""

from __future__ import annotations

from luban.netsim.collectives.schedule import Schedule, pieces


def ring_all_reduce(schedule: Schedule, size: int) -> None:
    """`size` bytes on each rank, summed on all."""
    _ring(schedule, size, 2 * (schedule.ranks - 1), 1)


def ring_reduce_scatter(schedule: Schedule, size: int) -> None:
    """`size` bytes on each rank; each ends with the sum of its part."""
    _ring(schedule, size, schedule.ranks - 1, 1)


def ring_all_gather(schedule: Schedule, size: int) -> None:
    """`size` bytes in parts on the ranks; each ends with all of them."""
    _ring(schedule, size, schedule.ranks - 1, 1)


def bidirectional_ring_all_reduce(schedule: Schedule, size: int) -> None:
    """Two rings, each with half of the bytes."""
    for half, direction in zip(pieces(size, 2), (1, -1), strict=True):
        _ring(schedule, half, 2 * (schedule.ranks - 1), direction)


def _ring(schedule: Schedule, size: int, steps: int, direction: int) -> None:
    """In step s rank r passes on piece r − s; it must have got it in the step before and have sent its last one."""
    n = schedule.ranks
    parts = pieces(size, n)
    came: list[int | None] = [None] * n  # the flow that brought each rank its newest piece
    for step in range(steps if n > 1 else 0):
        sent = [
            schedule.send(r, (r + direction) % n, parts[direction * (r - direction * step) % n], [came[r]])
            for r in range(n)
        ]
        came = [sent[(r - direction) % n] for r in range(n)]
