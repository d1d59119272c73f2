"""Flows at max-min fair rates over time: they start when it is their turn, and wait for others as in packet mode.

Rates are solved anew whenever a flow starts or has sent its bytes, over the flows under way. A flow arrives when its last byte has
crossed its links' delays; headers, acknowledgements and congestion control aren't there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luban.core.errors import DataError
from luban.core.log import progress
from luban.netsim.compiled import cached, compiled
from luban.netsim.flows import Flow
from luban.netsim.fluid import as_csr, fill, require_solvable, work_type
from luban.netsim.topology.network import Network, Path

STEP = 2000  # moments at which rates are solved, between two looks at the clock
START, ARRIVE = 0, 1  # kinds of events
SENT = 1e-9  # share of a flow's bytes that rounding may leave over
flow_type = np.dtype(
    [
        ("size", "f8"),  # bytes
        ("left", "f8"),
        ("start", "f8"),  # earliest start, or delay after what it waits for, seconds
        ("duration", "f8"),  # of work that sends nothing; below 0: it sends
        ("delay", "f8"),  # of its links together, seconds
        ("began", "f8"),
        ("finish", "f8"),
        ("waits_for", "i8"),  # flows that it waits for and that have not finished
        ("first_dependent", "i8"),
        ("dependents", "i8"),
    ]
)
clock_type = np.dtype([("now", "f8"), ("active", "i8"), ("events", "i8"), ("solved", "i8"), ("unfinished", "i8")])
event_type = np.dtype([("time", "f8"), ("flow", "i8"), ("kind", "i8")])


@dataclass(frozen=True)
class FluidOutcome:
    """When flows began and finished, in seconds; NaN: not before it was interrupted."""

    began: np.ndarray  # (flows,)
    finish: np.ndarray  # (flows,)
    solutions: int  # times that rates were solved
    interrupted: bool


def fluid_times(
    network: Network,
    paths: Sequence[Sequence[Path]],
    flows: Sequence[Flow],
    *,
    weighted: bool = False,
    show: bool = False,
) -> FluidOutcome:
    """Run flows to their end, or to Ctrl-C.

    Args:
        paths: of each flow; with several its rate is divided among them evenly. Work that sends nothing has none.
        weighted: whether rates are in proportion to the flows' weights.
        show: progress.

    Raises:
        DataError: a flow without a path, or flows that wait for each other in a circle.
    """
    for i, (flow, each) in enumerate(zip(flows, paths, strict=True)):
        if flow.duration is None and not each:
            raise DataError(f"flow {i} has no path")
    capacity = np.repeat([link.rate * 1.25e5 for link in network.links], 2)  # bytes a second of each port
    start, links = as_csr([[port for path in each for port in path] for each in paths])
    shares = np.repeat([1.0 / max(len(each), 1) for each in paths], np.diff(start))
    weights = np.array([flow.weight if weighted else 1.0 for flow in flows])
    require_solvable(links, capacity, shares, weights)
    rows, dependents = _rows(network, paths, flows)
    heap, active = np.zeros(2 * len(flows) + 1, event_type), np.zeros(len(flows), np.int64)
    rates, members = np.zeros(len(flows)), np.empty(len(links), np.int64)
    work, clock = np.zeros(len(capacity), work_type), np.zeros(1, clock_type)
    clock["unfinished"] = len(flows)
    interrupted, before = False, 0
    advance_flows(
        clock, 0, rows, dependents, heap, active, start, links, shares, capacity, weights, rates, work, members
    )
    with progress("solving", total=len(flows), unit="flows") as bar:
        while clock[0]["unfinished"] and (clock[0]["events"] or clock[0]["active"]):
            try:
                advance_flows(
                    clock,
                    STEP,
                    rows,
                    dependents,
                    heap,
                    active,
                    start,
                    links,
                    shares,
                    capacity,
                    weights,
                    rates,
                    work,
                    members,
                )
            except KeyboardInterrupt:
                interrupted = True
                break
            if show:
                done = len(flows) - int(clock[0]["unfinished"])
                bar.advance(done - before, f"simulated {1e3 * clock[0]['now']:.3g} ms")
                before = done
    if clock[0]["unfinished"] and not interrupted:
        stuck = int(np.flatnonzero(rows["waits_for"] > 0)[0])
        raise DataError(f"flow {stuck} waits for flows that wait for each other in a circle")
    return FluidOutcome(rows["began"], rows["finish"], int(clock[0]["solved"]), interrupted)


def _rows(network: Network, paths: Sequence[Sequence[Path]], flows: Sequence[Flow]) -> tuple[np.ndarray, np.ndarray]:
    """A record a flow, and the flows that wait for others, as slices of one array."""
    rows = np.zeros(len(flows), flow_type)
    rows["size"] = rows["left"] = [max(flow.size, 1) for flow in flows]
    rows["start"] = [flow.start / 1e12 for flow in flows]
    rows["duration"] = [-1.0 if flow.duration is None else flow.duration / 1e12 for flow in flows]
    delays: dict[Path, float] = {(): 0.0}
    for path in {path for each in paths for path in each}:
        delays[path] = sum(network.links[port >> 1].delay for port in path) / 1e12
    rows["delay"] = [max((delays[path] for path in each), default=0.0) for each in paths]
    rows["began"] = rows["finish"] = np.nan
    rows["waits_for"] = [len(flow.after) for flow in flows]
    waiting = sorted((before, i) for i, flow in enumerate(flows) for before in flow.after)
    rows["dependents"] = np.bincount([before for before, _ in waiting], minlength=len(flows))
    rows["first_dependent"] = np.cumsum(rows["dependents"]) - rows["dependents"]
    return rows, np.array([i for _, i in waiting], np.int64)


@cached
def advance_flows(
    clock, most, rows, dependents, heap, active, start, links, shares, capacity, weights, rates, work, members
):
    """Go on until `most` times rates were solved, or nothing is left. The first call starts what waits for nothing."""
    c = clock[0]
    if most == 0:
        for f in range(len(rows)):
            if rows[f].waits_for == 0:
                _push(c, heap, rows[f].start, f, START)
        return
    for _ in range(most):
        changed = False
        while c.events and heap[0].time <= c.now * (1 + 1e-12) + 1e-15:
            time, f, kind = heap[0].time, heap[0].flow, heap[0].kind
            _pop(c, heap)
            if kind == START:
                rows[f].began = time
                if rows[f].duration >= 0:
                    _push(c, heap, time + rows[f].duration, f, ARRIVE)
                else:
                    active[c.active] = f
                    c.active += 1
                    changed = True
                continue
            rows[f].finish = time
            c.unfinished -= 1
            for i in range(rows[f].first_dependent, rows[f].first_dependent + rows[f].dependents):
                waiting = dependents[i]
                rows[waiting].waits_for -= 1
                if rows[waiting].waits_for == 0:
                    _push(c, heap, time + rows[waiting].start, waiting, START)
        changed = _end(c, rows, heap, active) or changed
        if changed and c.active:
            fill(active, c.active, start, links, shares, capacity, weights, rates, work, members)
            c.solved += 1
        if not c.events and not c.active:
            return
        step = np.inf if not c.events else heap[0].time - c.now
        for i in range(c.active):
            step = min(step, rows[active[i]].left / rates[active[i]])
        step = max(step, 0.0)
        for i in range(c.active):
            rows[active[i]].left -= rates[active[i]] * step
        c.now = c.now + step


@compiled
def _end(c, rows, heap, active):
    """Take flows that have sent everything from those under way; returns whether there were any."""
    kept = 0
    for i in range(c.active):
        f = active[i]
        if rows[f].left <= SENT * rows[f].size:
            _push(c, heap, c.now + rows[f].delay, f, ARRIVE)
        else:
            active[kept] = f
            kept += 1
    ended = kept < c.active
    c.active = kept
    return ended


@compiled
def _push(c, heap, time, flow, kind):
    i = c.events
    c.events += 1
    while i > 0 and heap[(i - 1) >> 1].time > time:
        above = (i - 1) >> 1
        heap[i].time, heap[i].flow, heap[i].kind = heap[above].time, heap[above].flow, heap[above].kind
        i = above
    heap[i].time, heap[i].flow, heap[i].kind = time, flow, kind


@compiled
def _pop(c, heap):
    """Drop the first event."""
    c.events -= 1
    size = c.events
    time, flow, kind = heap[size].time, heap[size].flow, heap[size].kind
    i = 0
    while 2 * i + 1 < size:
        child = 2 * i + 1
        if child + 1 < size and heap[child + 1].time < heap[child].time:
            child += 1
        if heap[child].time >= time:
            break
        heap[i].time, heap[i].flow, heap[i].kind = heap[child].time, heap[child].flow, heap[child].kind
        i = child
    heap[i].time, heap[i].flow, heap[i].kind = time, flow, kind
