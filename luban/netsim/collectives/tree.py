"""All-reduce and broadcast along a binary tree, in chunks that follow each other: 2(log2(N) + c − 1)·(alpha + M/(c·B))."""

from __future__ import annotations

from luban.netsim.collectives.schedule import Schedule, pieces


def tree_all_reduce(schedule: Schedule, size: int, chunks: int = 8) -> None:
    """Up the tree to rank 0, then down again, chunk by chunk."""
    top: list[list[int]] = []
    up: dict[tuple[int, int], int] = {}
    for chunk, part in enumerate(pieces(size, chunks)):
        for rank in range(schedule.ranks - 1, 0, -1):
            below = [up[child, chunk] for child in _children(rank, schedule.ranks)]
            before = [up[rank, chunk - 1]] if chunk else []
            up[rank, chunk] = schedule.send(rank, _parent(rank), part, [*below, *before])
        top.append([up[child, chunk] for child in _children(0, schedule.ranks)])
    _down(schedule, size, chunks, top)


def tree_broadcast(schedule: Schedule, size: int, chunks: int = 8) -> None:
    """From rank 0 to all."""
    _down(schedule, size, chunks, [[] for _ in range(chunks)])


def _down(schedule: Schedule, size: int, chunks: int, ready: list[list[int]]) -> None:
    down: dict[tuple[int, int], int] = {}
    for chunk, part in enumerate(pieces(size, chunks)):
        for rank in range(1, schedule.ranks):
            parent = _parent(rank)
            came = [down[parent, chunk]] if parent else ready[chunk]
            before = [down[rank, chunk - 1]] if chunk else []
            down[rank, chunk] = schedule.send(parent, rank, part, [*came, *before])


def _parent(rank: int) -> int:
    return (rank - 1) // 2


def _children(rank: int, ranks: int) -> range:
    return range(2 * rank + 1, min(2 * rank + 3, ranks))
