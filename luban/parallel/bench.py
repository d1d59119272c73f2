"""Collectives measured: bytes sent beside the formula, time and bus bandwidth, beside those of the process group's own.

K bytes of the whole tensor, N processes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from luban.core.errors import TrainingError
from luban.core.units import bytes_, milliseconds
from luban.parallel.collectives import all_gather_single, reduce_scatter_single
from luban.parallel.point_to_point import PIECES, PointToPoint

NUMBERS = torch.float32
Call = Callable[[], Tensor | None]


class Collective(NamedTuple):
    """How a collective is called here and in torch, and what it costs."""

    calls: Callable[[PointToPoint, Tensor], tuple[Call, Call]]  # ours and torch's of a flat tensor of K bytes
    formula: str  # bytes sent, of the process that sends most
    sent: Callable[[int, int], int]  # the formula of K and N
    sent_by_all: Callable[[int, int], int]  # by all processes together
    bus: Callable[[int], float]  # factor on K/time, by N, for the bandwidth of a link (as nccl-tests defines it)


def _all_reduce(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def theirs() -> Tensor:
        dist.all_reduce(other, group=ring.group)
        return other

    mine, other = x.clone(), x.clone()
    return lambda: ring.all_reduce(mine), theirs


def _reduce_scatter(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def theirs() -> Tensor:
        reduce_scatter_single(found, x, group=ring.group)
        return found

    found = x.new_empty(x.numel() // ring.size)
    return lambda: ring.reduce_scatter(x), theirs


def _all_gather(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def theirs() -> Tensor:
        all_gather_single(found, part, group=ring.group)
        return found.view(ring.size, -1)

    found, part = torch.empty_like(x), x[: x.numel() // ring.size].clone()
    return lambda: ring.all_gather(part), theirs


def _all_to_all(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def theirs() -> Tensor:
        dist.all_to_all_single(found, rows, group=ring.group)
        return found

    rows = x.view(ring.size, -1)
    found = torch.empty_like(rows)
    return lambda: ring.all_to_all(rows), theirs


def _broadcast(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def theirs() -> Tensor:
        dist.broadcast(other, group=ring.group, group_src=0)
        return other

    mine, other = x.clone(), x.clone()
    return lambda: ring.broadcast(mine), theirs


def _reduce(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def ours() -> Tensor | None:
        return ring.reduce(mine) if ring.rank == 0 else _nothing(ring.reduce(mine))

    def theirs() -> Tensor | None:
        dist.reduce(other, group=ring.group, group_dst=0)
        return other if ring.rank == 0 else None

    mine, other = x.clone(), x.clone()
    return ours, theirs


def _nothing(_: Tensor) -> None:
    """What a process that is not the root holds is no result."""


def _gather(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def theirs() -> Tensor | None:
        into = list(found) if ring.rank == 0 else None
        dist.gather(part, into, group=ring.group, group_dst=0)
        return found if ring.rank == 0 else None

    part = x[: x.numel() // ring.size].clone()
    found = part.new_empty(ring.size, part.numel())
    return lambda: ring.gather(part), theirs


def _scatter(ring: PointToPoint, x: Tensor) -> tuple[Call, Call]:
    def theirs() -> Tensor:
        dist.scatter(found, list(rows) if ring.rank == 0 else None, group=ring.group, group_src=0)
        return found

    rows = x.view(ring.size, -1)
    found = torch.empty_like(rows[0])
    return lambda: ring.scatter(rows if ring.rank == 0 else None, found), theirs


def _share(K: int, N: int) -> int:
    return K // N * (N - 1)


COLLECTIVES = {
    "all_reduce": Collective(
        _all_reduce,
        "2(N-1)/N K",
        lambda K, N: 2 * _share(K, N),
        lambda K, N: 2 * (N - 1) * K,
        lambda N: 2 * (N - 1) / N,
    ),
    "reduce_scatter": Collective(_reduce_scatter, "(N-1)/N K", _share, lambda K, N: (N - 1) * K, lambda N: (N - 1) / N),
    "all_gather": Collective(_all_gather, "(N-1)/N K", _share, lambda K, N: (N - 1) * K, lambda N: (N - 1) / N),
    "all_to_all": Collective(_all_to_all, "(N-1)/N K", _share, lambda K, N: (N - 1) * K, lambda N: (N - 1) / N),
    "broadcast": Collective(_broadcast, "K", lambda K, N: K, lambda K, N: (N - 1) * K, lambda N: 1.0),
    "reduce": Collective(_reduce, "K", lambda K, N: K, lambda K, N: (N - 1) * K, lambda N: 1.0),
    "gather": Collective(_gather, "K/N", lambda K, N: K // N, _share, lambda N: (N - 1) / N),
    "scatter": Collective(_scatter, "(N-1)/N K", _share, _share, lambda N: (N - 1) / N),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One collective at one size."""

    collective: str
    bytes: int  # K
    sent: int  # bytes counted, of the process that sent most
    formula: int  # what the formula says of it
    sent_by_all: int  # bytes counted, of all processes
    formula_of_all: int
    seconds: float  # median, of the slowest process
    bus_bandwidth: float  # bytes a second
    peer: str  # the backend whose own collective was timed as well
    peer_seconds: float
    peer_bus_bandwidth: float

    @property
    def share(self) -> float:
        """Bandwidth as a fraction of the backend's own."""
        return self.bus_bandwidth / self.peer_bus_bandwidth


def measure(
    names: Sequence[str],
    sizes: Sequence[int],
    device: torch.device,
    *,
    repeats: int,
    pieces: int = PIECES,
    more: Sequence[dist.ProcessGroup] = (),
    group: dist.ProcessGroup | None = None,
    done: Callable[[Sequence[Row]], None] | None = None,
) -> list[Row]:
    """Run each collective at each size in all processes of a group, here and in torch, and compare the results.

    Args:
        sizes: bytes of the whole tensor; rounded up so that N processes share float32 numbers evenly.
        repeats: timed runs, after one that isn't.
        pieces: that the ring cuts messages into. more: see `PointToPoint`.
        group: None: all processes.
        done: called with the rows of each size.

    Raises:
        TrainingError: a result that is not torch's.
    """
    group = group or dist.group.WORLD
    assert group is not None
    ring, rows = PointToPoint(group, pieces, more), []
    for size in sizes:
        numbers = -(-size // (NUMBERS.itemsize * ring.size)) * ring.size
        generator = torch.Generator().manual_seed(ring.rank)
        x = torch.randint(-8, 8, (numbers,), generator=generator).to(device, NUMBERS)  # whose sums are exact
        for name in names:
            rows.append(_row(name, ring, x, repeats))
        if done is not None:
            done(rows[-len(names) :])
    return rows


def _row(name: str, ring: PointToPoint, x: Tensor, repeats: int) -> Row:
    collective, size = COLLECTIVES[name], x.numel() * x.element_size()
    ours, theirs = collective.calls(ring, x)
    ring.sent = 0
    found, right = ours(), theirs()
    sent = torch.tensor([ring.sent], device=x.device)
    most, total = sent.clone(), sent.clone()
    wrong = torch.tensor([found is not None and right is not None and not torch.equal(found, right)], device=x.device)
    counts = wrong.long()
    dist.all_reduce(most, dist.ReduceOp.MAX, group=ring.group)
    dist.all_reduce(total, group=ring.group)
    dist.all_reduce(counts, group=ring.group)
    if counts.item():
        raise TrainingError(f"{name} of {bytes_(size)} differs from torch's in {int(counts)} of {ring.size} processes")
    times = [_seconds(call, repeats, x.device, ring.group) for call in (ours, theirs)]
    rates = [size / seconds * collective.bus(ring.size) for seconds in times]
    return Row(
        collective=name,
        bytes=size,
        sent=int(most),
        formula=collective.sent(size, ring.size),
        sent_by_all=int(total),
        formula_of_all=collective.sent_by_all(size, ring.size),
        seconds=times[0],
        bus_bandwidth=rates[0],
        peer=dist.get_backend(ring.group),
        peer_seconds=times[1],
        peer_bus_bandwidth=rates[1],
    )


def _seconds(call: Call, repeats: int, device: torch.device, group: dist.ProcessGroup) -> float:
    """The median time of a call, from when all processes begin until the last has ended."""
    found = []
    for repeat in range(repeats + 1):
        dist.barrier(group=group)
        _synchronize(device)
        began = time.perf_counter()
        call()
        _synchronize(device)
        taken = torch.tensor([time.perf_counter() - began], device=device)
        dist.all_reduce(taken, dist.ReduceOp.MAX, group=group)
        if repeat:  # the first opens connections
            found.append(float(taken))
    return statistics.median(found)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: Sequence[Row], processes: int) -> str:
    """The rows for people."""
    peer = rows[0].peer if rows else ""
    head = ("collective", "size", "sent", "formula", "", "time", "bus", f"{peer} time", f"{peer} bus", "share")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        lines.append(
            (
                row.collective,
                bytes_(row.bytes),
                f"{row.sent:,} B",
                f"{row.formula:,} B",
                COLLECTIVES[row.collective].formula,
                milliseconds(row.seconds),
                f"{bytes_(row.bus_bandwidth)}/s",
                milliseconds(row.peer_seconds),
                f"{bytes_(row.peer_bus_bandwidth)}/s",
                f"{row.share:.0%}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(
            cell.ljust(w) if i in (0, 4) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    note = f"K = size, N = {processes} processes; sent: by the process that sends most; bus: as nccl-tests defines it"
    return "\n".join([*(line.rstrip() for line in text), note])
