"""All-reduce by halving and doubling (Rabenseifner), and by recursive doubling.

Halving-doubling exchanges M/2, M/4, … bytes with ranks 1, 2, 4, … away, then the same backwards: 2·log2(N)·alpha + 2(N − 1)/N·M/B.
Other numbers of ranks than powers of two fold the extra ranks into their neighbours first and unfold them last, which adds
2·alpha + 2·M/B. Recursive doubling exchanges all M bytes log2(N) times: log2(N)·(alpha + M/B).
"""

from __future__ import annotations

from luban.netsim.collectives.schedule import Schedule, require_power_of_two


def halving_doubling_all_reduce(schedule: Schedule, size: int) -> None:
    """`size` bytes on each rank, summed on all. The first and last exchanges, of half the bytes, are between ranks r and r ^ 1."""
    power = 1 << (schedule.ranks.bit_length() - 1)
    extra = schedule.ranks - power
    # Of the first 2·extra ranks the odd ones hand their data to the even ones, which take part for both.
    group = [*range(0, 2 * extra, 2), *range(2 * extra, schedule.ranks)]
    last: list[int | None] = [None] * schedule.ranks
    for rank in range(0, 2 * extra, 2):
        last[rank] = schedule.send(rank + 1, rank, size)
    distances = [1 << step for step in range(power.bit_length() - 1)]
    parts = [size >> (step + 1) for step in range(len(distances))]
    for distance, part in [*zip(distances, parts, strict=True), *zip(distances[::-1], parts[::-1], strict=True)]:
        _exchange(schedule, group, distance, part, last)
    for rank in range(0, 2 * extra, 2):
        schedule.send(rank, rank + 1, size, [last[rank]])


def recursive_doubling_all_reduce(schedule: Schedule, size: int) -> None:
    """`size` bytes on each rank, summed on all; for small messages."""
    steps = require_power_of_two(schedule.ranks, "recursive doubling")
    last: list[int | None] = [None] * schedule.ranks
    for step in range(steps):
        _exchange(schedule, range(schedule.ranks), 1 << step, size, last)


def _exchange(schedule: Schedule, group, distance: int, size: int, last: list[int | None]) -> None:
    """Each rank of the group sends to the one at `distance`, when both have what the exchange before brought (rendezvous)."""
    sent = {}
    for i, rank in enumerate(group):
        other = group[i ^ distance]
        sent[i] = schedule.send(rank, other, size, [last[rank], last[other]])
    for i, rank in enumerate(group):
        last[rank] = sent[i ^ distance]
