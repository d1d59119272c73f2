"""Seconds of collectives over the processes of a plan's axis: α–β by levels, inside of nodes and between them.

Processes lie on GPUs in the order of their ranks. An axis of n processes whose neighbours are `stride` ranks apart has k of them
in a node and s = n/k nodes. A ring over all of them, one for each of the k, moves an all-gather's K bytes in
(k − 1)/k·K/B₁ inside and (s − 1)/s·K/(k·B₂) between nodes, as each GPU has a network port of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from luban.core.errors import ConfigError, MissingExtra
from luban.core.log import warn
from luban.planner.cluster import Cluster
from luban.planner.machine import MachineTable

Collective = Literal["all-reduce", "all-gather", "reduce-scatter", "send", "all-to-all"]
Crossing = Literal["ring", "send", "all-to-all"]  # between nodes
HOSTS = 2048  # of a network that is solved for max-min fair rates, at most; a larger one by a part of it


@dataclass(frozen=True)
class Axis:
    """Processes that communicate: how many, and how many ranks apart neighbours are."""

    size: int
    stride: int


@dataclass
class Messages:
    """Times of collectives on a cluster."""

    cluster: Cluster
    table: MachineTable
    _rates: dict[Axis, float] = field(default_factory=dict)

    def levels(self, axis: Axis) -> tuple[int, int]:
        """(processes of the axis in a node, nodes)."""
        inside = max(min(axis.size, self.cluster.gpus_per_node // axis.stride), 1)
        while axis.size % inside:
            inside -= 1
        return inside, axis.size // inside

    def seconds(self, collective: Collective, size: float, axis: Axis) -> float:
        """Of `size` bytes: of an all-reduce on each process, of an all-gather or reduce-scatter the whole, otherwise those that a
        process sends."""
        if axis.size == 1 or size <= 0:
            return 0.0
        inside, nodes = self.levels(axis)
        fast = self.cluster.link.bandwidth * 1e9 * self.table.links
        alpha = 1e-6 * self.cluster.link.latency_us
        if collective == "send":
            crosses = nodes > 1 and (axis.stride >= self.cluster.gpus_per_node or inside == 1)
            if crosses:
                return self.crossing("send", size, axis)
            return size / fast + (1e-6 * self.cluster.network.latency_us if nodes > 1 else alpha)
        if collective == "all-to-all":
            far = (nodes - 1) / nodes * size
            near = max(size - far, 0) * (inside - 1) / inside / fast
            return near + (self.crossing("all-to-all", far, axis) if nodes > 1 else alpha)
        once = (inside - 1) * (size / inside / fast + alpha)
        once += self.crossing("ring", size / inside, axis) if nodes > 1 else 0.0
        return 2 * once if collective == "all-reduce" else once

    def crossing(self, kind: Crossing, size: float, axis: Axis) -> float:
        """Seconds between nodes, by closed form: once round rings of nodes (`size` bytes in parts), or messages of `size` bytes a
        process to the next node or to all others."""
        nodes = self.levels(axis)[1]
        steps, part = (nodes - 1, size / nodes) if kind == "ring" else (1, size)
        return steps * part / self._between(axis) + self.starts(kind, axis) * 1e-6 * self.cluster.network.latency_us

    def starts(self, kind: Crossing, axis: Axis) -> int:
        """Messages between nodes that start one after the other."""
        nodes = self.levels(axis)[1]
        return {"ring": nodes - 1, "send": 1, "all-to-all": nodes}[kind]

    def nominal(self) -> float:
        """Bytes a second of a GPU between nodes without contention."""
        return self.cluster.network.bandwidth * 1e9 * self.table.network

    def _between(self, axis: Axis) -> float:
        """Bytes a second of a GPU between nodes while all groups of the axis communicate."""
        if axis not in self._rates:
            contended = self._contended(axis) if self.cluster.topology is not None else float("inf")
            self._rates[axis] = min(self.nominal(), contended)
        return self._rates[axis]

    def successors(self, axis: Axis, hosts: int, most: int = HOSTS) -> list[tuple[int, int]]:
        """(GPU, the one that it sends to) in the rings of nodes of an axis: of rings alike those of the first `most` GPUs, one at
        least.

        Raises:
            ConfigError: fewer hosts than a ring has GPUs.
        """
        inside, nodes = self.levels(axis)
        ring, found = axis.stride * axis.size, []
        if hosts < ring:
            raise ConfigError(
                f"the network's topology has {hosts} hosts, and a ring of the plan has {ring} GPUs: it needs a host for each GPU"
            )
        for gpu in range(max(min(hosts, most) // ring, 1) * ring):
            base, at = gpu // ring * ring, gpu % ring
            place, lane = divmod(at, axis.stride)
            node, member = divmod(place, inside)
            to = base + (((node + 1) % nodes) * inside + member) * axis.stride + lane
            if to != gpu:
                found.append((gpu, to))
        return found

    def _contended(self, axis: Axis) -> float:
        """The slowest flow's max-min fair rate when every GPU sends to its successor in the rings of the axis."""
        try:
            from luban.netsim.fluid import max_min_rates
        except (ModuleNotFoundError, MissingExtra):
            warn("the cluster's topology is ignored: contention needs numba: pip install 'luban[plan]'")
            return float("inf")
        import numpy as np

        assert self.cluster.topology is not None
        network = self.cluster.topology.network()
        rng = np.random.default_rng(0)
        paths = [network.hashed_path(gpu, to, rng) for gpu, to in self.successors(axis, len(network.hosts))]
        capacity = np.repeat([link.rate * 1.25e5 for link in network.links], 2)
        return float(max_min_rates(paths, capacity).min()) * self.table.network
