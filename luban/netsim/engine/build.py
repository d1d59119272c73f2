"""The arrays of a simulation, filled from a network, its switches, a transport and flows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luban.core.seeding import derive
from luban.netsim.congestion.base import Transport
from luban.netsim.engine import layout as at
from luban.netsim.engine.flow_arrays import flow_arrays
from luban.netsim.engine.paths import Segments, busiest_ports, flow_paths, round_trip
from luban.netsim.engine.port_arrays import port_arrays
from luban.netsim.flows import NEVER, Flow
from luban.netsim.switches import Switches
from luban.netsim.topology.network import Network

FIRST_POOL = 4096  # packets


def build_state(
    network: Network,
    switches: Switches,
    transport: Transport,
    flows: Sequence[Flow],
    *,
    seed: int = 0,
    base_rtt: int | None = None,
    watched_ports: Sequence[int] = (),
    watched_flows: Sequence[int] = (),
    watch_busiest: int = 0,
    sample_every: int = 0,
    samples: int = 4096,
) -> at.State:
    """Everything in place for the first event.

    Args:
        base_rtt: T of HPCC and the others in ps; by default the longest unloaded round trip of the flows.
        watched_ports: whose queues are sampled.
        watched_flows: whose received bytes are sampled.
        watch_busiest: sample also the queues of so many switch ports, those that most paths cross.
        sample_every: ps between samples, 0: none.
        samples: kept at most; then every second one goes and the interval doubles.

    Raises:
        ConfigError, DataError: what doesn't fit together.
    """
    segments = Segments(network, flows, seed)
    paths, first, counts = flow_paths(network, transport, flows, segments, seed)
    rtt = base_rtt or max((round_trip(network, transport, p) for p in set(paths)), default=1)
    classes = len({flow.cls for flow in flows if flow.duration is None})
    ports, queues, nodes, host_rate = port_arrays(network, switches, transport, classes)
    flow_rows, lanes, profiles, dependents = flow_arrays(network, transport, flows, paths, first, counts, rtt)
    segments.number(flow_rows)
    watched_ports = [*watched_ports, *busiest_ports(network, paths, watch_busiest)]
    total_packets = int(flow_rows["packets"].sum())
    state = at.State(
        world=np.zeros(1, at.world_type),
        heap=np.zeros(2 * len(ports) + 5 * len(flows) + 2 * len(lanes) + 64, at.event_type),
        ports=ports,
        queues=queues,
        nodes=nodes,
        packets=np.zeros(FIRST_POOL, at.packet_type),
        telemetry=np.zeros(FIRST_POOL, at.telemetry_type),
        flows=flow_rows,
        lanes=lanes,
        profiles=profiles,
        path_start=np.concatenate([[0], np.cumsum([len(p) for p in paths])]).astype(np.int64),
        path_ports=np.array([port for p in paths for port in p], np.int32),
        dependents=dependents,
        segments=segments.lists,
        segment_nodes=np.array(list(segments.hops), np.int32),
        next_hops=np.array([port for hops in segments.hops.values() for port in hops], np.int32),
        arrived=np.zeros(total_packets, np.uint8),
        acked=np.zeros(total_packets, np.uint8),
        watched_ports=np.array(watched_ports, np.int32),
        watched_flows=np.array(watched_flows, np.int32),
        port_samples=np.zeros((samples, len(watched_ports), 2), np.int64),
        flow_samples=np.zeros((samples, len(watched_flows)), np.int64),
        sample_times=np.zeros(samples, np.int64),
    )
    _world(state, transport, seed, host_rate, rtt, sample_every, switches)
    return state


def _world(state: at.State, transport: Transport, seed: int, host_rate: int, rtt: int, sample_every: int, switches):
    world = state.world[0]
    world["rng"] = derive(seed, "engine") | 1
    world["payload"], world["header"], world["ack_size"] = transport.payload, transport.header, transport.ack_size
    world["ack_class"] = 0 if transport.ack_priority else 1
    world["ack_every"], world["ack_delay"] = transport.ack_every, round(transport.ack_delay_us * 1e6)
    world["probe_gap"] = round(transport.probe_us * 1e6)
    world["segment_base"], world["segment_bytes"] = transport.segment_base, transport.segment_bytes
    world["node_count"] = len(state.nodes)
    world["mark_at_enqueue"] = switches.mark_at == "enqueue"
    world["nic_rate"], world["base_rtt"] = host_rate, rtt
    world["flow_count"] = world["unfinished"] = len(state.flows)
    world["sample_every"] = sample_every
    world["stall_after"] = NEVER
    world["most_samples"] = len(state.sample_times)
    world["watched_port_count"], world["watched_flow_count"] = len(state.watched_ports), len(state.watched_flows)
    state.packets["next"] = np.arange(1, len(state.packets) + 1)
    state.packets["next"][-1] = -1
    world["free_head"], world["free_count"] = 0, len(state.packets)


def enlarge_pool(state: at.State) -> None:
    """Twice the packets."""
    old = len(state.packets)
    state.packets = np.concatenate([state.packets, np.zeros(old, at.packet_type)])
    state.telemetry = np.concatenate([state.telemetry, np.zeros(old, at.telemetry_type)])
    state.packets["next"][old:] = np.arange(old + 1, 2 * old + 1)
    state.packets["next"][-1] = state.world[0]["free_head"]
    state.world[0]["free_head"] = old
    state.world[0]["free_count"] += old
    state.write_addresses()
