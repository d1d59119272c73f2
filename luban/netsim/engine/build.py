"""The arrays of a simulation, filled from a network, its switches, a transport and flows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from luban.core.errors import ConfigError, DataError
from luban.core.seeding import derive, generator
from luban.netsim.congestion.base import Transport
from luban.netsim.engine import layout as at
from luban.netsim.flows import Flow
from luban.netsim.switches import KINDS, Switches
from luban.netsim.topology.network import Network, Path

UNLIMITED = 1 << 60
NEVER = 1 << 62
MOST_PACKETS = 1 << 30  # of a flow: their numbers are 32 bits
RECOVERIES = {"go_back_n": at.GO_BACK_N, "newreno": at.NEWRENO, "selective": at.SELECTIVE}
ROUTINGS = {
    "ecmp": at.ONE_PATH,
    "spray": at.SPRAY,
    "round_robin": at.ROUND_ROBIN,
    "per_path": at.BY_LANE,
    "adaptive": at.ADAPTIVE,
}
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
    paths, first, counts = _paths(network, transport, flows, segments, seed)
    rtt = base_rtt or max((round_trip(network, transport, p) for p in paths), default=1)
    classes = len({flow.cls for flow in flows if flow.duration is None})
    ports, queues, nodes, host_rate = _ports(network, switches, transport, classes)
    lanes_of = counts if transport.routing == "per_path" else np.minimum(counts, 1)
    first_lane = np.concatenate([[0], np.cumsum(lanes_of)])
    flow_rows, profiles = _flows(network, transport, flows, paths, first, counts, lanes_of, first_lane, rtt)
    lanes = _lanes(flow_rows, paths_by_lane=transport.routing == "per_path")
    dependents = _dependents(flow_rows, flows)
    segments.number(flow_rows)
    watched_ports = [*watched_ports, *_busiest(network, paths, watch_busiest)]
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


def _paths(
    network: Network, transport: Transport, flows: Sequence[Flow], segments: Segments, seed: int
) -> tuple[list[Path], np.ndarray, np.ndarray]:
    """Paths of all flows one after the other; of each flow the number of its first and how many it has."""
    paths: list[Path] = []
    first, counts = np.zeros(len(flows), np.int64), np.zeros(len(flows), np.int64)
    several = transport.routing != "ecmp"
    rng = generator(seed, "paths")
    known: dict[tuple[int, int], tuple[int, int]] = {}
    for i, flow in enumerate(flows):
        first[i] = len(paths)
        if flow.duration is not None:
            continue
        if flow.src == flow.dst:
            raise DataError(f"flow {i} goes from host {flow.src} to itself")
        if flow.segments is not None:
            paths.append(network.segment_path(flow.src, flow.segments, flow.dst, segments.hops))
        elif flow.route is not None:
            paths.append(flow.route)
        elif several:
            if (flow.src, flow.dst) not in known:
                found = network.shortest_paths(flow.src, flow.dst, transport.max_paths, rng)
                known[flow.src, flow.dst] = (len(paths), len(found))
                paths += found
            first[i], counts[i] = known[flow.src, flow.dst]
            continue
        else:
            paths.append(network.hashed_path(flow.src, flow.dst, rng))
        counts[i] = 1
    if transport.telemetry == 1:
        for path in paths:
            passed = sum(network.is_fabric(network.ends(port)[0]) for port in path)
            if passed > at.HOPS:
                raise ConfigError(f"a path of {passed} switches: telemetry holds {at.HOPS} hops")
    return paths, first, counts


class Segments:
    """Segment routing: `hops[target]`, the port by which every node sends towards each node that flows' lists name; `lists`: the
    targets of all flows one after the other, by their place in `hops`, each flow's destination last."""

    def __init__(self, network: Network, flows: Sequence[Flow], seed: int):
        rng = generator(seed, "segments")
        self.hops: dict[int, list[int]] = {}
        self.of: dict[int, tuple[int, ...]] = {}  # flow → its list
        for i, flow in enumerate(flows):
            if flow.segments is None:
                continue
            wrong = [node for node in flow.segments if not 0 <= node < len(network.names) or not network.switches[node]]
            if wrong:
                raise DataError(f"flow {i}: segment {wrong[0]} is no switch of the topology")
            self.of[i] = (*flow.segments, network.hosts[flow.dst])
            if any(a == b for a, b in itertools.pairwise(self.of[i])):
                raise DataError(f"flow {i}: the same segment twice in a row")
            for target in self.of[i]:
                if target not in self.hops:
                    self.hops[target] = network.next_hops(target, rng)
        self.lists = np.zeros(0, np.int32)

    def number(self, rows: np.ndarray) -> None:
        """Write each flow's list, and where it is."""
        place = {target: i for i, target in enumerate(self.hops)}
        found: list[int] = []
        for i, targets in self.of.items():
            rows[i]["first_segment"], rows[i]["segments"] = len(found), len(targets)
            rows[i]["routing"] = at.SEGMENTS
            found += [place[target] for target in targets]
        self.lists = np.array(found, np.int32)


def _sending_rate(network: Network, path: Path) -> int:
    """What congestion control takes for the line rate: the slowest link up to the first switch of the network."""
    rates = []
    for port in path:
        rates.append(network.links[port >> 1].rate)
        if network.is_fabric(network.ends(port)[1]):
            break
    return min(rates)


def _busiest(network: Network, paths: list[Path], most: int) -> list[int]:
    """The switch ports that most paths cross."""
    counts = Counter(port for path in paths for port in path if network.is_fabric(network.ends(port)[0]))
    return [port for port, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def round_trip(network: Network, transport: Transport, path: Path) -> int:
    """Time (ps) of a full packet and its acknowledgement over an idle path."""
    total = 0
    for port in path:
        link = network.links[port >> 1]
        total += 2 * link.delay
        total += (transport.payload + transport.header + transport.ack_size) * 8_000_000 // link.rate
    return total


def _ports(network: Network, switches: Switches, transport: Transport, classes: int):
    """Ports, queues and nodes, and the fastest host port's rate; `classes` of traffic are in use."""
    ports = np.zeros(2 * len(network.links), at.port_type)
    queues = np.zeros(len(ports) * at.CLASSES, at.queue_type)
    nodes = np.zeros(len(network.names), at.node_type)
    packet = transport.payload + transport.header
    host_rate = network.nic_rate()
    buffer = switches.buffer(host_rate)
    if buffer < packet or 0 < switches.port_bytes < packet:
        raise ConfigError(
            f"switch buffers of {min(buffer, switches.port_bytes or buffer)} bytes hold no packet of {packet}"
        )
    nodes["is_switch"] = network.switches
    nodes["buffer"], nodes["alpha"], nodes["reserve"] = buffer, switches.alpha, switches.reserve_bytes
    nodes["flow_control"] = KINDS[switches.flow_control]
    nodes["flow_control"][list(network.inside)] = at.CREDITS
    nodes["reports"] = [network.is_fabric(node) for node in range(len(nodes))]
    for name in ("pipe_head", "pipe_tail"):
        ports[name] = -1
    ports["next_class"] = 1
    for name in ("head", "tail", "ready_head", "ready_tail"):
        queues[name] = -1
    quantum = np.array([1.0, *switches.class_weights])
    queues["quantum"] = np.tile(np.round(quantum / quantum[1:].min() * packet), len(ports))
    queues["credits"] = UNLIMITED
    for index in range(len(ports)):
        _fill_port(ports[index], index, network, switches, transport, host_rate)
        nodes["kept"][ports[index]["peer"]] += classes * (ports[index]["headroom"] + switches.reserve_bytes)
        peer = nodes[ports[index]["peer"]]
        if peer["is_switch"] and peer["flow_control"] == at.CREDITS:
            queues["credits"][index * at.CLASSES : (index + 1) * at.CLASSES] = switches.credit_bytes
    if (nodes["flow_control"] == at.CREDITS).any() and switches.credit_bytes < 2 * packet:
        raise ConfigError(f"switch.credit_bytes {switches.credit_bytes}: two packets of {packet} bytes are the least")
    for node in np.flatnonzero(
        nodes["is_switch"] & (nodes["kept"] > nodes["buffer"]) & (nodes["flow_control"] == at.PFC)
    ):
        raise ConfigError(
            f"switch {network.names[node]}: headroom and reserve of its ports need {nodes['kept'][node]} bytes, "
            f"and the buffer has {buffer}: use --switch.buffer_bytes {2 * nodes['kept'][node]}"
        )
    return ports, queues, nodes, host_rate


def _fill_port(port, index: int, network: Network, switches: Switches, transport: Transport, host_rate: int):
    link = network.links[index >> 1]
    port["node"], port["peer"] = network.ends(index)
    port["rate"], port["delay"] = link.rate, link.delay
    port["limit"], port["down"] = switches.port_bytes, index >> 1 in network.failed
    if network.is_fabric(port["node"]):
        low, high, share = switches.marks(link.rate, transport.marks(link.rate))
        port["mark_low"], port["mark_high"], port["mark_share"] = low, high, share
    port["shift"] = switches.shift(link.rate, host_rate)
    if switches.flow_control == "pfc" and network.is_fabric(port["peer"]):
        packet = transport.payload + transport.header
        port["headroom"] = switches.headroom(link.rate, link.delay, packet, network.port_name(index))


def _flows(network, transport, flows, paths, first, counts, lanes_of, first_lane, rtt):
    """Rows of flows, and the parameters of their profiles: one a rate of host ports."""
    rows = np.zeros(len(flows), at.flow_type)
    profiles: dict[int, int] = {}
    bits = 0
    for i, flow in enumerate(flows):
        row = rows[i]
        _check(i, flow, len(flows))
        row["start"], row["finish"], row["began"] = flow.start, -1, -1
        row["src"], row["dst"], row["cls"] = flow.src, flow.dst, flow.cls
        row["waits_for"] = len(flow.after)
        row["bits"], row["next_ready"] = bits, -1
        if flow.duration is not None:
            row["duration"] = flow.duration
            continue
        path = paths[first[i]]
        if len({paths[p][0] for p in range(first[i], first[i] + counts[i])}) > 1:
            raise DataError(f"flow {i}: its paths leave host {flow.src} by different ports")
        rate = _sending_rate(network, path)
        packets = max(1, -(-flow.size // transport.payload))
        if packets > MOST_PACKETS:
            raise DataError(
                f"flow {i}: {flow.size} bytes are {packets} packets of transport.payload {transport.payload}, and a flow has at most "
                f"{MOST_PACKETS}: make it smaller, or use mode fluid"
            )
        row["size"], row["packets"] = flow.size, packets
        row["weight"] = max(1, round(flow.weight * 1000))
        row["port"], row["profile"] = path[0], profiles.setdefault(rate, len(profiles))
        row["first_path"], row["paths"] = first[i], counts[i]
        row["first_lane"], row["lanes"] = first_lane[i], lanes_of[i]
        bits += int(row["packets"])
    rows["cc"], rows["telemetry"] = transport.code, transport.telemetry
    rows["recovery"], rows["routing"] = RECOVERIES[transport.recovery], ROUTINGS[transport.routing]
    rows["reorder"] = transport.reorder or 1 << 30
    rows["rto_min"] = round(transport.rto_us * 1e6)
    rows["cnp_gap"] = round(transport.cnp_gap_us() * 1e6)
    rows["last_cnp"], rows["last_nack"], rows["recover"], rows["held"] = -NEVER, -1, -1, -1
    table = np.zeros(max(len(profiles), 1), at.profile_type)
    for rate, index in profiles.items():
        table["params"][index] = transport.parameters(rate, rtt)
    return rows, table


def _check(i: int, flow: Flow, flows: int) -> None:
    if flow.size < 0 or flow.start < 0 or (flow.duration or 0) < 0:
        raise DataError(f"flow {i}: size, start and duration must not be below 0")
    if not 1 <= flow.cls < at.CLASSES:
        raise DataError(f"flow {i}: traffic classes are 1 to {at.CLASSES - 1}, {flow.cls} given")
    for other in flow.after:
        if not 0 <= other < flows or other == i:
            raise DataError(f"flow {i} waits for flow {other}, which isn't another one of 0 to {flows - 1}")


def _lanes(rows: np.ndarray, paths_by_lane: bool) -> np.ndarray:
    lanes = np.zeros(max(int(rows["lanes"].sum()), 1), at.lane_type)
    flow_of = np.repeat(np.arange(len(rows)), rows["lanes"])
    lanes["flow"][: len(flow_of)] = flow_of
    offset = np.arange(len(flow_of)) - rows["first_lane"][flow_of]
    lanes["path"][: len(flow_of)] = rows["first_path"][flow_of] + (offset if paths_by_lane else 0)
    return lanes


def _dependents(rows: np.ndarray, flows: Sequence[Flow]) -> np.ndarray:
    """For each flow the flows that wait for it, as slices of one array."""
    waiting = [(before, i) for i, flow in enumerate(flows) for before in flow.after]
    waiting.sort()
    rows["dependents"] = np.bincount([before for before, _ in waiting], minlength=len(flows))[: len(flows)]
    rows["first_dependent"] = np.concatenate([[0], np.cumsum(rows["dependents"])[:-1]]) if len(flows) else 0
    return np.array([i for _, i in waiting], np.int32)


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
