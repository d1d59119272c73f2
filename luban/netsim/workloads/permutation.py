"""A random permutation: every host sends to one other and receives from one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.netsim.flows import Flow
from luban.netsim.topology.network import Network
from luban.netsim.workloads.base import Workload


@dataclass(frozen=True, kw_only=True)
class Permutation(Workload):
    """A random permutation without fixed points."""

    bytes: int = 10_000_000  # a flow

    def flows(self, network: Network, rng: np.random.Generator) -> list[Flow]:
        """One flow a host."""
        return [Flow(src, dst, self.bytes) for src, dst in enumerate(derangement(len(network.hosts), rng))]


def derangement(n: int, rng: np.random.Generator) -> list[int]:
    """A permutation of n ≥ 2 without fixed points: the cycle through all in random order."""
    order = rng.permutation(n)
    found = np.empty(n, np.int64)
    found[order] = np.roll(order, -1)
    return [int(x) for x in found]
