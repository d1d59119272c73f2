"""Servers as seen from inside: GPUs and network cards on PCIe switches, these on a root complex that all share.

A GPU reaches the network over its PCIe switch and a card there, or, in servers that have their cards at the root complex, over the
root complex. Main memory hangs on the root complex too, and what is read from it shares the way to a GPU. PCIe hands out credits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from luban.core.errors import ConfigError
from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class Servers(Topology):
    """Servers of `gpus` GPUs on PCIe switches. By default each GPU has a card beside it, as EFLOPS's (Dong et al. 2020)."""

    OPTIONAL: ClassVar[tuple[str, ...]] = ("nic_memory_gbps",)

    servers: int = 4
    gpus: int = 8  # a server
    nics: int = 8  # a server
    pcie_switches: int = 8  # a server; GPUs, and cards that hang there, are dealt to them evenly
    nic_at: Literal["pcie_switch", "root"] = "pcie_switch"  # what a card hangs on
    pcie_gbps: float = 128.0  # of a PCIe link, the one from a switch to the root complex too
    memory_gbps: float = 400.0  # between the root complex and main memory
    nic_gbps: float = 100.0
    nic_memory_gbps: float = 0.0  # of memory on each card, as NetDAM's; 0: there is none
    servers_per_leaf: int = 16
    spines: int = 1  # where there are several leaves
    spine_gbps: float = 400.0  # of a link between leaf and spine
    pcie_delay_us: float = 0.1  # of a PCIe link, the switch's own time included

    def build(self) -> Network:
        """Host s·gpus + g is GPU g of server s; after them the memories of the servers, and then those of the cards."""
        self.require(servers=1, gpus=1, nics=1, pcie_switches=1, servers_per_leaf=1, spines=1)
        if self.gpus % self.pcie_switches:
            raise ConfigError(f"topology: {self.gpus} GPUs can't be dealt to {self.pcie_switches} PCIe switches evenly")
        if self.nic_memory_gbps < 0:
            raise ConfigError(f"topology.nic_memory_gbps must not be below 0, {self.nic_memory_gbps} given")
        network = Network()
        gpus = [[network.add_host(f"gpu{s}.{g}") for g in range(self.gpus)] for s in range(self.servers)]
        memories = [network.add_host(f"memory{s}") for s in range(self.servers)]
        leaves = [network.add_switch(f"leaf{i}", 3) for i in range(-(-self.servers // self.servers_per_leaf))]
        cards: list[tuple[str, int]] = []
        for server in range(self.servers):
            cards += self._server(
                network, server, gpus[server], memories[server], leaves[server // self.servers_per_leaf]
            )
        if self.nic_memory_gbps:
            for name, card in cards:
                memory = network.add_host(f"card-memory{name}")
                network.connect(memory, card, self.nic_memory_gbps, 0.0)
        if len(leaves) > 1:
            for spine in [network.add_switch(f"spine{i}", 4) for i in range(self.spines)]:
                for leaf in leaves:
                    network.connect(leaf, spine, self.spine_gbps, self.delay_us)
        return network

    def _server(self, network: Network, server: int, gpus: list[int], memory: int, leaf: int) -> list[tuple[str, int]]:
        """One server; returns the names and nodes of its cards."""
        root = network.add_switch(f"root{server}", 2, inside=True)
        network.connect(memory, root, self.memory_gbps, self.pcie_delay_us)
        switches = [network.add_switch(f"pcie{server}.{i}", 1, inside=True) for i in range(self.pcie_switches)]
        for switch in switches:
            network.connect(switch, root, self.pcie_gbps, self.pcie_delay_us)
        for i, gpu in enumerate(gpus):
            network.connect(gpu, switches[i * self.pcie_switches // self.gpus], self.pcie_gbps, self.pcie_delay_us)
        cards = []
        for i in range(self.nics):
            card = network.add_switch(f"nic{server}.{i}", 2, inside=True)
            at = root if self.nic_at == "root" else switches[i * self.pcie_switches // self.nics]
            network.connect(card, at, self.pcie_gbps, self.pcie_delay_us)
            network.connect(card, leaf, self.nic_gbps, self.delay_us)
            cards.append((f"{server}.{i}", card))
        return cards
