"""The paths of flows: shortest ones by hash, several to choose among, source routes, lists of segments."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from luban.core.errors import ConfigError
from luban.core.seeding import generator
from luban.netsim.congestion.base import Transport
from luban.netsim.engine import layout as at
from luban.netsim.flows import Flow
from luban.netsim.topology.network import Network, Path


def flow_paths(
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
            raise ConfigError(f"flow {i} goes from host {flow.src} to itself")
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
                raise ConfigError(f"flow {i}: segment {wrong[0]} is no switch of the topology")
            self.of[i] = (*flow.segments, network.hosts[flow.dst])
            if any(a == b for a, b in itertools.pairwise(self.of[i])):
                raise ConfigError(f"flow {i}: the same segment twice in a row")
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


def sending_rate(network: Network, path: Path) -> int:
    """What congestion control takes for the line rate: the slowest link up to the first switch of the network."""
    rates = []
    for port in path:
        rates.append(network.links[port >> 1].rate)
        if network.is_fabric(network.ends(port)[1]):
            break
    return min(rates)


def busiest_ports(network: Network, paths: list[Path], most: int) -> list[int]:
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
