"""Dragonfly (Kim et al. 2008): groups of switches that are all joined, and links between all groups."""

from __future__ import annotations

from dataclasses import dataclass

from luban.core.errors import ConfigError
from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class Dragonfly(Topology):
    """A dragonfly of `groups` groups of `switches` switches with `hosts_per_switch` hosts and `global_links` links to others."""

    groups: int = 9
    switches: int = 4  # a group
    hosts_per_switch: int = 2
    global_links: int = 2  # a switch
    gbps: float = 100.0  # of every link
    global_delay_us: float = 1.0  # propagation between groups

    def build(self) -> Network:
        """The links of a group to the others are dealt to its switches in turn."""
        self.require(groups=2, switches=1, hosts_per_switch=1, global_links=1)
        if self.groups - 1 > self.switches * self.global_links:
            raise ConfigError(
                f"topology: {self.groups} groups need {self.groups - 1} global links a group, and {self.switches} switches "
                f"with {self.global_links} have {self.switches * self.global_links}"
            )
        network = Network()
        groups = []
        for g in range(self.groups):
            group = [network.add_switch(f"switch{g}.{i}") for i in range(self.switches)]
            groups.append(group)
            for i, switch in enumerate(group):
                for _ in range(self.hosts_per_switch):
                    host = network.add_host(f"host{len(network.hosts)}")
                    network.connect(host, switch, self.gbps, self.delay_us)
                for other in group[:i]:
                    network.connect(other, switch, self.gbps, self.delay_us)
        for g in range(self.groups):
            for h in range(g + 1, self.groups):
                a, b = groups[g][(h - 1) % self.switches], groups[h][g % self.switches]
                network.connect(a, b, self.gbps, self.global_delay_us)
        return network
