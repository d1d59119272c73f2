"""What a simulation gave, as plain data: a summary, a row a flow, a row a port, samples of queues."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from luban.netsim.flows import Flow
from luban.netsim.scenario import FluidRun
from luban.netsim.simulation import Outcome, Simulation

PERCENTILES = (50, 90, 95, 99, 100)


def summary(simulation: Simulation, outcome: Outcome) -> dict[str, Any]:
    """Completion times, goodput, queues, losses, and what the run itself cost. Figures are of the whole run; queues and use of the
    watched ports are also given of the second half of the samples, when long flows have settled. `completion_seconds` is None where
    a flow hasn't finished; goodput and use are then over the time that was simulated."""
    rows, ports = simulation.state.flows, simulation.state.ports
    sends = np.array([flow.duration is None for flow in simulation.flows])
    times, queues, _ = simulation.samples()
    finished = simulation.makespan() if outcome.complete else None
    span = outcome.simulated if finished is None else finished
    half = len(times) // 2
    busiest = int(np.argmax(ports["tx_bytes"] / ports["rate"]))
    return {
        "complete": bool(outcome.complete),
        "reason": outcome.reason,
        "deadlock": list(outcome.deadlock),
        "simulated_seconds": outcome.simulated,
        "completion_seconds": finished,
        "flows": int(sends.sum()),
        "flows_finished": int((sends & (rows["finish"] >= 0)).sum()),
        "bytes_received": int(rows["received"].sum()),
        "goodput_gbps": float(rows["received"].sum()) * 8 / span / 1e9 if span else 0.0,
        "flow_seconds": _percentiles(simulation.completion_times()[sends]),
        "by_label": _by_label(simulation.flows, simulation.completion_times(), simulation.finish_times()),
        "queue_bytes": _of_watched(simulation, lambda i: _percentiles(queues[:, i, 0])),
        "second_half": {
            "from_seconds": float(times[half]) if len(times) else 0.0,
            "queue_bytes": _of_watched(simulation, lambda i: _percentiles(queues[half:, i, 0])),
            "use": _of_watched(simulation, lambda i: _use(simulation, i, half)),
        },
        "use": _of_watched(simulation, lambda i: _use(simulation, i, 0)),
        "busiest_port": simulation.network.port_name(busiest),
        "busiest_port_use": float(ports["tx_bytes"][busiest] * 8 / (ports["rate"][busiest] * 1e6 * span))
        if span
        else 0.0,
        "longest_queue_bytes": int(_of_switches(simulation, "max_queue").max(initial=0)),
        "fullest_switch_bytes": int(simulation.state.nodes["max_used"].max(initial=0)),
        "drops": int(ports["drops"].sum()),
        "marks": int(ports["marks"].sum()),
        "pauses": int(ports["pauses"].sum()),
        "paused_seconds": float(ports["paused_time"].sum()) / 1e12,
        "retransmits": int(rows["retransmits"].sum()),
        "timeouts": int(rows["timeouts"].sum()),
        "samples": len(times),
        "events": outcome.events,
        "packets_delivered": outcome.delivered,
        "packet_hops": outcome.hops,
        "seconds": outcome.seconds,
        "events_per_second": outcome.events / outcome.seconds if outcome.seconds else 0.0,
    }


def span(found: dict[str, Any]) -> float:
    """Seconds that rates and shares of a summary are over: until the last flow had arrived, or all that was simulated."""
    return found["simulated_seconds"] if found["completion_seconds"] is None else found["completion_seconds"]


def _of_watched(simulation: Simulation, figure: Callable[[int], Any]) -> dict[str, Any]:
    """Name → figure of each watched port, by its place among them."""
    ports = simulation.state.watched_ports.tolist()
    return {simulation.network.port_name(port): figure(i) for i, port in enumerate(ports)}


def _use(simulation: Simulation, i: int, first: int) -> float | None:
    """Share of its rate at which the i-th watched port has sent from a sample to the last; None without two samples."""
    times, ports, _ = simulation.samples()
    if len(times) - first < 2:
        return None
    rate = float(simulation.state.ports["rate"][simulation.state.watched_ports[i]]) * 1e6
    return float(ports[-1, i, 1] - ports[first, i, 1]) * 8 / (times[-1] - times[first]) / rate


def _of_switches(simulation: Simulation, column: str) -> np.ndarray:
    """A column of the ports that belong to switches."""
    ports = simulation.state.ports
    return ports[column][np.array(simulation.network.switches)[ports["node"]]]


def _percentiles(values: np.ndarray) -> dict[str, float]:
    values = values[~np.isnan(values)]
    if not len(values):
        return {}
    found = {
        f"p{p}" if p < 100 else "max": float(x)
        for p, x in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }
    return {"mean": float(values.mean()), "deviation": float(values.std()), **found}


def _by_label(flows: Sequence[Flow], times: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    """Completion times of the flows of each label, where there are several, how many there are and have finished, and when the
    last of them ended: None where one has not."""
    labels = [flow.label if flow.duration is None else "" for flow in flows]
    names = list(dict.fromkeys(name for name in labels if name))
    if not 2 <= len(names) <= 20:
        return {}
    found = {}
    for name in names:
        chosen = [i for i, label in enumerate(labels) if label == name]
        done = int((~np.isnan(ends[chosen])).sum())
        end = float(ends[chosen].max()) if done == len(chosen) else None
        found[name] = {**_percentiles(times[chosen]), "end": end, "flows": len(chosen), "flows_finished": done}
    return found


def flow_rows(simulation: Simulation) -> Iterator[dict[str, Any]]:
    """One object a flow. `slowdown` is the completion time over that of an idle network."""
    times = simulation.completion_times()
    for i, (flow, row) in enumerate(zip(simulation.flows, simulation.state.flows, strict=True)):
        if flow.duration is not None:
            continue
        done = not np.isnan(times[i])
        yield {
            "flow": i,
            "from": flow.src,
            "to": flow.dst,
            "bytes": flow.size,
            "label": flow.label,
            "start_seconds": int(row["began"]) / 1e12 if row["began"] >= 0 else None,
            "seconds": float(times[i]) if done else None,
            "slowdown": float(times[i]) / ideal_seconds(simulation, i) if done and flow.since is None else None,
            "received": int(row["received"]),
            "retransmits": int(row["retransmits"]),
            "timeouts": int(row["timeouts"]),
        }


def ideal_seconds(simulation: Simulation, i: int) -> float:
    """Time of flow i alone: its packets through its slowest link, one packet through the others."""
    state, transport = simulation.state, simulation.transport
    row = state.flows[i]
    path = state.path_ports[state.path_start[row["first_path"]] : state.path_start[row["first_path"] + 1]]
    rates = state.ports["rate"][path].astype(float)
    last = int(row["size"]) - (int(row["packets"]) - 1) * transport.payload + transport.header
    full = transport.payload + transport.header
    one = full if row["packets"] > 1 else last
    bits = 8e6 * (((int(row["packets"]) - 1) * full + last - one) / rates.min() + (one / rates).sum())
    return float(bits + state.ports["delay"][path].sum()) / 1e12


def port_rows(simulation: Simulation, seconds: float) -> Iterator[dict[str, Any]]:
    """One object a port that sent anything; `link` is the number that `run.fail_links` and `topology.failed_links` take."""
    for i, row in enumerate(simulation.state.ports):
        if row["tx_bytes"]:
            yield {
                "port": simulation.network.port_name(i),
                "link": i >> 1,
                "gbps": int(row["rate"]) / 1000,
                "bytes": int(row["tx_bytes"]),
                "use": float(row["tx_bytes"]) * 8 / (float(row["rate"]) * 1e6 * seconds) if seconds else 0.0,
                "max_queue_bytes": int(row["max_queue"]),
                "drops": int(row["drops"]),
                "marks": int(row["marks"]),
                "pauses": int(row["pauses"]),
                "paused_seconds": int(row["paused_time"]) / 1e12,
            }


def queue_rows(simulation: Simulation) -> Iterator[dict[str, Any]]:
    """One object a sample: bytes queued at the watched ports, and received of the watched flows, by their numbers."""
    times, ports, received = simulation.samples()
    names = [simulation.network.port_name(int(port)) for port in simulation.state.watched_ports]
    flows = simulation.state.watched_flows.tolist()
    for t, row, bytes_ in zip(times, ports, received.tolist(), strict=True):
        found = {"seconds": float(t), "queue_bytes": {name: int(row[i, 0]) for i, name in enumerate(names)}}
        yield {**found, **({"received_bytes": dict(zip(map(str, flows), bytes_, strict=True))} if flows else {})}


def fluid_completion_times(run: FluidRun) -> np.ndarray:
    """As `Simulation.completion_times`, of fluid mode: seconds, (flows,)."""
    since = np.array([i if flow.since is None else flow.since for i, flow in enumerate(run.flows)], np.int64)
    return run.outcome.finish - run.outcome.began[since]


def fluid_summary(run: FluidRun) -> dict[str, Any]:
    """The same of fluid mode, as far as it goes."""
    flows, outcome = run.flows, run.outcome
    sends = np.array([flow.duration is None for flow in flows])
    times, done = fluid_completion_times(run), ~np.isnan(outcome.finish)
    simulated = float(np.nanmax([outcome.began, outcome.finish], initial=0.0))
    total = sum(flow.size for flow, arrived in zip(flows, done.tolist(), strict=True) if arrived)
    return {
        "complete": bool(done.all()),
        "reason": "interrupted" if outcome.interrupted else "finished",
        "simulated_seconds": simulated,
        "completion_seconds": simulated if done.all() else None,
        "flows": int(sends.sum()),
        "flows_finished": int((sends & done).sum()),
        "goodput_gbps": total * 8 / simulated / 1e9 if simulated else 0.0,
        "flow_seconds": _percentiles(times[sends]),
        "by_label": _by_label(flows, times, outcome.finish),
        "solutions": outcome.solutions,
    }


def fluid_flow_rows(run: FluidRun) -> Iterator[dict[str, Any]]:
    """One object a flow, of fluid mode."""
    times = fluid_completion_times(run)
    for i, flow in enumerate(run.flows):
        if flow.duration is None:
            began, seconds = (None if np.isnan(x) else float(x) for x in (run.outcome.began[i], times[i]))
            about = {"flow": i, "from": flow.src, "to": flow.dst, "bytes": flow.size, "label": flow.label}
            yield {**about, "start_seconds": began, "seconds": seconds}


def fluid_port_rows(run: FluidRun, seconds: float) -> Iterator[dict[str, Any]]:
    """One object a port that carried a flow which has finished."""
    for port in np.flatnonzero(run.carried).tolist():
        rate = run.network.links[port >> 1].rate
        yield {
            "port": run.network.port_name(port),
            "link": port >> 1,
            "gbps": rate / 1000,
            "bytes": round(float(run.carried[port])),
            "use": float(run.carried[port]) * 8 / (rate * 1e6 * seconds) if seconds else 0.0,
        }
