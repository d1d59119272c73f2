"""A collective over the hosts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from luban.core.errors import ConfigError
from luban.netsim.collectives import halving_doubling, hierarchical, pairwise, ring, tree
from luban.netsim.collectives.schedule import Schedule
from luban.netsim.flows import Flow, at_microseconds
from luban.netsim.topology.bigraph import halving_doubling_hosts
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload

Algorithm = Literal[
    "ring",
    "bidirectional_ring",
    "halving_doubling",
    "recursive_doubling",
    "tree",
    "broadcast",
    "hierarchical",
    "torus",
    "all_to_all",
    "all_gather",
    "reduce_scatter",
]
SIMPLE = {
    "ring": ring.ring_all_reduce,
    "bidirectional_ring": ring.bidirectional_ring_all_reduce,
    "halving_doubling": halving_doubling.halving_doubling_all_reduce,
    "recursive_doubling": halving_doubling.recursive_doubling_all_reduce,
    "all_to_all": pairwise.all_to_all,
    "all_gather": ring.ring_all_gather,
    "reduce_scatter": ring.ring_reduce_scatter,
}


@dataclass(frozen=True, kw_only=True)
class Collective(Workload):
    """One collective; all-reduce where the name says nothing else."""

    algorithm: Algorithm = "ring"
    bytes: int = 100_000_000  # on each rank
    ranks: int = 0  # 0: all hosts
    alpha_us: float = 0.0  # software before each send
    placement: Literal["in_order", "random", "across", "halving_doubling"] = (
        "in_order"  # of ranks on hosts; the last for BiGraph
    )
    group: int = 8  # hierarchical: ranks of a group; across: hosts of a server, next ranks being on different ones
    shape: tuple[int, int, int] = (4, 4, 4)  # torus: its size
    at_once: int = 1  # torus: ports of a node in use, 1, 3 or 6
    chunks: int = 8  # tree, broadcast: pieces that follow each other

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """The graph of its flows."""
        schedule = Schedule(self.hosts(len(network.hosts), rng), at_microseconds(self.alpha_us), self.algorithm)
        self.add_to(schedule)
        return schedule.flows

    def hosts(self, available: int, rng: np.random.Generator) -> list[int]:
        """The host of each rank."""
        ranks = self.ranks or available
        if not 2 <= ranks <= available:
            raise ConfigError(f"workload.ranks must be from 2 to {available}, the hosts of the topology; {ranks} given")
        if self.placement == "halving_doubling":
            return halving_doubling_hosts(ranks)
        if self.placement == "across":
            if ranks % self.group:
                raise ConfigError(f"workload.group {self.group} doesn't divide {ranks} ranks")
            return [host for first in range(self.group) for host in range(first, ranks, self.group)]
        return (
            [int(h) for h in rng.permutation(available)[:ranks]] if self.placement == "random" else list(range(ranks))
        )

    def add_to(self, schedule: Schedule) -> None:
        """Append the flows."""
        if self.bytes < 1:
            raise ConfigError(f"workload.bytes must be at least 1, {self.bytes} given")
        x, y, z = self.shape
        if self.algorithm == "torus" and (min(self.shape) < 1 or x * y * z != schedule.ranks):
            raise ConfigError(
                f"workload.shape {x},{y},{z} must multiply to the {schedule.ranks} ranks, as topology.x, y and z of a torus do"
            )
        if self.algorithm == "torus" and self.at_once not in (1, 3, 6):
            raise ConfigError(f"workload.at_once must be 1, 3 or 6 ports of a torus's node, {self.at_once} given")
        if self.algorithm == "hierarchical" and (self.group < 1 or schedule.ranks % self.group):
            raise ConfigError(f"workload.group {self.group} doesn't divide {schedule.ranks} ranks")
        if self.algorithm == "hierarchical":
            hierarchical.hierarchical_all_reduce(schedule, self.bytes, self.group)
        elif self.algorithm == "torus":
            hierarchical.torus_all_reduce(schedule, self.bytes, self.shape, self.at_once)
        elif self.algorithm == "tree":
            tree.tree_all_reduce(schedule, self.bytes, self.chunks)
        elif self.algorithm == "broadcast":
            tree.tree_broadcast(schedule, self.bytes, self.chunks)
        else:
            SIMPLE[self.algorithm](schedule, self.bytes)
