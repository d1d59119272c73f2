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
        slow = self._between(axis) if nodes > 1 else fast
        alpha = 1e-6 * (self.cluster.network if nodes > 1 else self.cluster.link).latency_us
        if collective == "send":
            return size / (slow if axis.stride >= self.cluster.gpus_per_node or inside == 1 < nodes else fast) + alpha
        if collective == "all-to-all":
            far = (nodes - 1) / nodes * size
            return far / slow + max(size - far, 0) * (inside - 1) / inside / fast + alpha * nodes
        steps = 1e-6 * ((inside - 1) * self.cluster.link.latency_us + (nodes - 1) * self.cluster.network.latency_us)
        once = (inside - 1) / inside * size / fast + (nodes - 1) / nodes * size / inside / slow + steps
        return 2 * once if collective == "all-reduce" else once

    def _between(self, axis: Axis) -> float:
        """Bytes a second of a GPU between nodes while all groups of the axis communicate."""
        if axis not in self._rates:
            nominal = self.cluster.network.bandwidth * 1e9 * self.table.network
            contended = self._contended(axis) if self.cluster.topology is not None else nominal
            self._rates[axis] = min(nominal, contended)
        return self._rates[axis]

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
        hosts, rng = len(network.hosts), np.random.default_rng(0)
        inside, nodes = self.levels(axis)
        ring = axis.stride * axis.size
        paths = []
        if hosts < ring:
            raise ConfigError(
                f"the cluster's topology has {hosts} hosts, and a ring of the plan has {ring} GPUs: it needs a host for each GPU"
            )
        for gpu in range(max(min(hosts, HOSTS) // ring, 1) * ring):  # of rings alike so many, one at least
            base, at = gpu // ring * ring, gpu % ring
            place, lane = divmod(at, axis.stride)
            node, member = divmod(place, inside)
            to = base + (((node + 1) % nodes) * inside + member) * axis.stride + lane
            if to != gpu:
                paths.append(network.hashed_path(gpu, to, rng))
        capacity = np.repeat([link.rate * 1.25e5 for link in network.links], 2)
        return float(max_min_rates(paths, capacity).min()) * self.table.network
