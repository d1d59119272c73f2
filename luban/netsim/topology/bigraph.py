"""EFLOPS's BiGraph (Dong et al. 2020): two groups of switches, every switch joined to all of the other group.

Hosts of different groups have one shortest path, by two switches; hosts of one group are joined by a relay in the other. With the
rank mapping below, every step of halving-doubling goes from one group to the other and puts at most one flow on each link.
"""

from __future__ import annotations

from dataclasses import dataclass

from luban.core.errors import ConfigError
from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class BiGraph(Topology):
    """A BiGraph of 2·`switches` switches."""

    switches: int = 4  # a side
    hosts_per_switch: int = 4
    host_gbps: float = 100.0  # of a host's link
    fabric_gbps: float = 100.0  # of a link between switches

    def build(self) -> Network:
        """Hosts of the left group first."""
        self.require(switches=1, hosts_per_switch=1)
        network = Network()
        sides = [[network.add_switch(f"{side}{i}", 1) for i in range(self.switches)] for side in ("left", "right")]
        for side in sides:
            for switch in side:
                for _ in range(self.hosts_per_switch):
                    host = network.add_host(f"host{len(network.hosts)}")
                    network.connect(host, switch, self.host_gbps, self.delay_us)
        for a in sides[0]:
            for b in sides[1]:
                network.connect(a, b, self.fabric_gbps, self.delay_us)
        return network


def halving_doubling_hosts(ranks: int) -> list[int]:
    """The host of each rank in a BiGraph of S = 2^s switches a side with S hosts each, for N = 2^(2s+1) ranks.

    Ranks with an even number of one bits go left, the others right, so that every exchange crosses sides; with x = rank >> 1, left
    ranks are at switch x >> s, right ones at switch x mod S.

    Raises:
        ConfigError: a number of ranks that is no odd power of two.
    """
    bits = ranks.bit_length() - 1
    if ranks < 2 or ranks != 1 << bits or bits % 2 == 0:
        raise ConfigError(f"the rank mapping for halving-doubling is for 2, 8, 32, 128, … ranks, {ranks} given")
    s = (bits - 1) // 2
    size = 1 << s
    hosts = []
    for rank in range(ranks):
        x = rank >> 1
        high, low = x >> s, x & (size - 1)
        hosts.append(high * size + low if rank.bit_count() % 2 == 0 else size * size + low * size + high)
    return hosts
