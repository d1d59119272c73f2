"""What is to be sent: flows, and work without traffic, with what each of them waits for."""

from __future__ import annotations

from dataclasses import dataclass

from luban.netsim.topology.network import Path

NEVER = 1 << 62  # ps: after everything


@dataclass(slots=True)
class Flow:
    """`size` bytes from host `src` to host `dst`; or, where `duration` is given, work on host `src` that sends nothing."""

    src: int
    dst: int
    size: int
    start: int = 0  # ps: when it starts, or how long after the last of `after` has finished
    after: tuple[int, ...] = ()  # numbers of the flows that it waits for
    duration: int | None = None  # ps of work
    cls: int = 1  # traffic class: 1 to 3
    weight: float = 1.0  # µFAB's share
    route: Path | None = None  # source route, instead of a shortest path
    segments: tuple[int, ...] | None = (
        None  # segment routing: nodes to pass, each by a shortest path from the one before
    )
    since: int | None = None  # number of the flow from whose start its time is counted, as of a question and its answer
    label: str = ""  # what it belongs to, for tables


def at_microseconds(value: float) -> int:
    """Microseconds as integer picoseconds."""
    return round(value * 1e6)
