"""All-to-all, permutations and the chain of a pipeline."""

from __future__ import annotations

from luban.netsim.collectives.schedule import Schedule


def all_to_all(schedule: Schedule, size: int, in_flight: int = 0) -> None:
    """`size` bytes on each rank, 1/N of them for each rank. Rank r sends to r + 1, r + 2, …

    Args:
        in_flight: sends of a rank at once, 0: all.
    """
    n = schedule.ranks
    sent: list[list[int]] = [[] for _ in range(n)]
    for step in range(1, n):
        for rank in range(n):
            before = [sent[rank][-in_flight]] if in_flight and len(sent[rank]) >= in_flight else []
            sent[rank].append(schedule.send(rank, (rank + step) % n, size // n, before))


def pipeline(schedule: Schedule, size: int, microbatches: int, forward: int, backward: int) -> None:
    """Activations and gradients of `microbatches` through the ranks as pipeline stages, all forwards before all backwards (GPipe).

    Args:
        size: bytes of the activations of a micro-batch between two stages.
        forward: ps of a stage's forward pass of a micro-batch.
        backward: ps of its backward pass.
    """
    n = schedule.ranks
    busy: list[int | None] = [None] * n
    for stages, duration in ((range(n), forward), (range(n - 1, -1, -1), backward)):
        for _ in range(microbatches):
            came: int | None = None
            order = list(stages)
            for i, rank in enumerate(order):
                busy[rank] = schedule.compute(rank, duration, [came, busy[rank]])
                came = schedule.send(rank, order[i + 1], size, [busy[rank]]) if i + 1 < n else None
