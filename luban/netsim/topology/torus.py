"""A three-dimensional torus: a switch a node, joined to two neighbours in each dimension."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class Torus(Topology):
    """A torus of x · y · z nodes."""

    x: int = 4
    y: int = 4
    z: int = 4
    link_gbps: float = 100.0  # between neighbours
    host_gbps: float = 600.0  # between a node's host and its switch

    def build(self) -> Network:
        """Host (x, y, z) is number (x·Y + y)·Z + z."""
        self.require(x=1, y=1, z=1)
        network, size = Network(), (self.x, self.y, self.z)
        at = {}
        for place in product(*map(range, size)):
            name = ",".join(map(str, place))
            at[place] = network.add_switch(f"switch{name}")
            network.connect(network.add_host(f"host{name}"), at[place], self.host_gbps, 0.0)
        for place in at:
            for axis, n in enumerate(size):
                other = tuple((c + (i == axis)) % n for i, c in enumerate(place))
                if n > 2 or (n == 2 and place[axis] == 0):
                    network.connect(at[place], at[other], self.link_gbps, self.delay_us)
        return network
