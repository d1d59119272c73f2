"""Rail-optimised clusters: NIC i of every server hangs on the leaf switches of rail i, and NVLink joins a server's GPUs.

A host is a GPU with its own NIC. A server's GPUs are joined by a switch that stands for NVLink; a path between servers on one rail
passes one leaf, between rails a spine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class Rails(Topology):
    """Servers of `gpus` GPUs, a rail each. The defaults are a cluster like Tencent's HCC: 8 NICs of 400 Gb/s a server."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("nvlink_gbps",)

    servers: int = 8
    gpus: int = 8  # a server, and as many rails
    servers_per_leaf: int = 8  # a rail has a leaf for so many servers
    spines: int = 8
    nic_gbps: float = 400.0
    spine_gbps: float = 400.0  # of a link between leaf and spine
    nvlink_gbps: float = 3600.0  # of a GPU to the others of its server, each way; 0: none
    nvlink_delay_us: float = 0.3

    def build(self) -> Network:
        """Host s·gpus + g is GPU g of server s."""
        self.require(servers=1, gpus=1, servers_per_leaf=1, spines=1)
        network = Network()
        blocks = -(-self.servers // self.servers_per_leaf)
        leaves = [[network.add_switch(f"leaf{b}.{r}", 1) for r in range(self.gpus)] for b in range(blocks)]
        spines = [network.add_switch(f"spine{i}", 2) for i in range(self.spines)]
        for server in range(self.servers):
            inside = network.add_switch(f"nvlink{server}", 1, inside=True) if self.nvlink_gbps else -1
            for gpu in range(self.gpus):
                host = network.add_host(f"gpu{server}.{gpu}")
                network.connect(host, leaves[server // self.servers_per_leaf][gpu], self.nic_gbps, self.delay_us)
                if inside >= 0:
                    network.connect(host, inside, self.nvlink_gbps, self.nvlink_delay_us)
        for block in leaves:
            for leaf in block:
                for spine in spines:
                    network.connect(leaf, spine, self.spine_gbps, self.delay_us)
        return network
