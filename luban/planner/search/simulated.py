"""Messages between nodes priced by the network simulator, at fluid rates or packet by packet, while all groups of an axis communicate.

Of a ring a few steps are simulated: all are alike, over the paths that the hash gave each pair once. Packet mode simulates parts of at
most a megabyte and goes on along the line through half and the whole of it. What a plan sends inside of a node stays closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from luban.core.errors import LubanError
from luban.netsim.congestion.base import Transport
from luban.netsim.congestion.constant import Constant
from luban.netsim.flows import Flow
from luban.netsim.fluid_flows import fluid_times
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network, Path
from luban.planner.search.estimate import Workload
from luban.planner.search.messages import HOSTS, Axis, Crossing, Messages

Way = Literal["fluid", "packets"]
STEPS = 4  # of a ring
PACKET_HOSTS = 256  # of a network whose packets are simulated, at most, or one ring
PACKET_PART = 1 << 20  # bytes of a message that packets simulate, at most


@dataclass(frozen=True)
class NetworkModel:
    """A network with a host for each GPU, and how its hosts send; by default without congestion control."""

    topology: Topology
    transport: Transport = field(default_factory=lambda: Constant(payload=4096))
    switches: Switches = field(default_factory=Switches)


@dataclass(frozen=True)
class Priced:
    """One kind of message between nodes."""

    kind: Crossing
    size: float  # bytes, as `Messages.crossing` takes them
    axis: Axis
    seconds: float


@dataclass
class SimulatedMessages(Messages):
    """Times of collectives over a network of `luban simulate`; `priced` holds what was asked for.

    Args:
        network: with a host for each GPU.
    """

    network: Network = field(kw_only=True)
    transport: Transport = field(kw_only=True)
    switches: Switches = field(kw_only=True)
    way: Way = field(kw_only=True, default="fluid")
    priced: list[Priced] = field(default_factory=list)
    _paths: dict[tuple[int, int], Path] = field(default_factory=dict)
    _seconds: dict[tuple[Crossing, Axis, float], float] = field(default_factory=dict)

    def crossing(self, kind: Crossing, size: float, axis: Axis) -> float:
        """Seconds between nodes; not less than the cluster file's bandwidth allows."""
        nodes = self.levels(axis)[1]
        steps, part = (nodes - 1, size / nodes) if kind == "ring" else (1, size)
        pairs = self._pairs(kind, axis)
        wire = max(sum(self.network.links[port >> 1].delay for port in self._path(*pair)) for pair in pairs) / 1e12
        sent = max((self._sent(kind, part, axis, pairs) - wire) / self.table.network, part / self.nominal())
        found = steps * sent + self.starts(kind, axis) * max(1e-6 * self.cluster.network.latency_us, wire)
        self.priced.append(Priced(kind, size, axis, found))
        return found

    def _pairs(self, kind: Crossing, axis: Axis) -> list[tuple[int, int]]:
        """(GPU, GPU) that communicate at once."""
        following = self.successors(axis, len(self.network.hosts), HOSTS if self.way == "fluid" else PACKET_HOSTS)
        if kind != "all-to-all":
            return following
        nexts, found = dict(following), []
        for gpu in nexts:
            other = nexts[gpu]
            while other != gpu:
                found.append((gpu, other))
                other = nexts[other]
        return found

    def _path(self, gpu: int, other: int) -> Path:
        """The hash of a pair stays the same."""
        if (gpu, other) not in self._paths:
            self._paths[gpu, other] = self.network.hashed_path(gpu, other, np.random.default_rng((gpu, other)))
        return self._paths[gpu, other]

    def _sent(self, kind: Crossing, part: float, axis: Axis, pairs: list[tuple[int, int]]) -> float:
        """Seconds of a step in which every process sends `part` bytes."""
        share = part / (self.levels(axis)[1] - 1) if kind == "all-to-all" else part
        if self.way == "fluid":
            return self._simulated(kind, share, axis, pairs)
        if share <= PACKET_PART:
            return self._simulated(kind, share, axis, pairs)
        half, whole = (self._simulated(kind, size, axis, pairs) for size in (PACKET_PART / 2, PACKET_PART))
        return whole + (share - PACKET_PART) * (whole - half) / (PACKET_PART / 2)

    def _simulated(self, kind: Crossing, size: float, axis: Axis, pairs: list[tuple[int, int]]) -> float:
        key = (kind, axis, size)
        if key not in self._seconds:
            steps = STEPS if kind == "ring" else 1
            flows = _flows(pairs, max(round(size), 1), steps)
            run = self._fluid if self.way == "fluid" else self._packets
            self._seconds[key] = run([replace(f, route=self._path(f.src, f.dst)) for f in flows]) / steps
        return self._seconds[key]

    def _fluid(self, flows: list[Flow]) -> float:
        paths = [[flow.route] for flow in flows if flow.route is not None]
        return float(fluid_times(self.network, paths, flows).finish.max())

    def _packets(self, flows: list[Flow]) -> float:
        simulation = Simulation(self.network, flows, self.transport, self.switches)
        outcome = simulation.run()
        if outcome.reason == "interrupted":
            raise KeyboardInterrupt
        if not outcome.complete:
            raise LubanError(f"the packets of a plan's messages do not arrive: {outcome.reason}")
        return simulation.makespan()


def _flows(pairs: list[tuple[int, int]], size: int, steps: int) -> list[Flow]:
    """Each pair's message, `steps` times; one waits for what came to its sender and what it has sent in the step before."""
    came = {other: i for i, (_, other) in enumerate(pairs)}
    flows = []
    for step in range(steps):
        before = (step - 1) * len(pairs)
        for i, (gpu, other) in enumerate(pairs):
            after = tuple(sorted({before + came[gpu], before + i})) if step else ()
            flows.append(Flow(gpu, other, size, after=after))
    return flows


def simulated(workload: Workload, network: NetworkModel, way: Way) -> tuple[Workload, SimulatedMessages]:
    """The same workload, its messages between nodes priced over a network."""
    messages, model = workload.model.messages, workload.model
    found = SimulatedMessages(
        messages.cluster,
        messages.table,
        network=network.topology.network(),
        transport=network.transport,
        switches=network.switches,
        way=way,
    )
    return replace(workload, model=model.with_messages(found)), found
