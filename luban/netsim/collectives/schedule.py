"""A graph of flows under construction, and the ways in which collectives extend it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from luban.core.errors import ConfigError
from luban.netsim.flows import Flow


@dataclass
class Schedule:
    """Flows, in an order in which each comes after those that it waits for.

    `hosts[rank]` is the host of a rank; `alpha` (ps) is added before each send, as the time of software and of a reduction's start.
    """

    hosts: Sequence[int]
    alpha: int = 0
    label: str = ""
    flows: list[Flow] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """How many take part."""
        return len(self.hosts)

    def send(self, src: int, dst: int, size: int, after: Iterable[int | None] = ()) -> int:
        """`size` bytes from rank to rank, after the given flows; returns the flow's number."""
        waits = tuple(sorted({n for n in after if n is not None}))
        self.flows.append(Flow(self.hosts[src], self.hosts[dst], size, start=self.alpha, after=waits, label=self.label))
        return len(self.flows) - 1

    def compute(self, rank: int, duration: int, after: Iterable[int | None] = ()) -> int:
        """Work of `duration` ps on a rank; returns its number."""
        waits = tuple(sorted({n for n in after if n is not None}))
        self.flows.append(Flow(self.hosts[rank], self.hosts[rank], 0, after=waits, duration=duration, label=self.label))
        return len(self.flows) - 1

    def extend(
        self, other: Schedule, before: Sequence[int | None], hosts: Sequence[int] | None = None
    ) -> list[list[int]]:
        """Append another schedule over the same hosts, or over the given ones: its first flows of each rank wait for `before[rank]`.

        Returns the numbers of the flows that each rank sends or receives, which what comes next has to wait for.
        """
        hosts = self.hosts if hosts is None else hosts
        offset, touched = len(self.flows), [[] for _ in hosts]
        rank_of = {host: rank for rank, host in enumerate(hosts)}
        for i, flow in enumerate(other.flows):
            first = [] if flow.after else [before[rank_of[flow.src]], before[rank_of[flow.dst]]]
            flow.after = tuple(sorted({n + offset for n in flow.after} | {n for n in first if n is not None}))
            self.flows.append(flow)
            for rank in {rank_of[flow.src], rank_of[flow.dst]}:
                touched[rank].append(offset + i)
        return touched


def pieces(size: int, n: int) -> list[int]:
    """`size` bytes divided among n, as evenly as whole bytes allow."""
    return [size * (i + 1) // n - size * i // n for i in range(n)]


def require_power_of_two(ranks: int, what: str) -> int:
    """log2 of the number of ranks. Raises DataError where it isn't a power of two."""
    if ranks < 2 or ranks & (ranks - 1):
        raise ConfigError(f"{what} needs 2, 4, 8, … ranks, {ranks} given")
    return ranks.bit_length() - 1
