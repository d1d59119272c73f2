"""X-MAN 4.0: eight accelerators of a server in a hybrid cube mesh, several servers behind a switch.

Each accelerator has links to the other three of its half and to its twin in the other half. Published: 8 accelerators, 56 GB/s in
both directions together, 32 a rack; the split over links is this project's assumption.
"""

from __future__ import annotations

from dataclasses import dataclass

from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network

HALF = 4


@dataclass(frozen=True, kw_only=True)
class XMan(Topology):
    """Servers of eight accelerators in a hybrid cube mesh."""

    servers: int = 4
    mesh_gbps: float = 56.0  # of a link between accelerators, each way
    port_gbps: float = 224.0  # of an accelerator into the mesh: all its links together
    nic_gbps: float = 100.0  # of an accelerator's network port
    mesh_delay_us: float = 0.3

    def build(self) -> Network:
        """Host 8·s + i is accelerator i of server s. Its router forwards for the others, as NVLink's and OAM's do."""
        self.require(servers=1)
        network = Network()
        rack = network.add_switch("rack", 2)
        for server in range(self.servers):
            routers = []
            for i in range(2 * HALF):
                host = network.add_host(f"acc{server}.{i}")
                routers.append(network.add_switch(f"router{server}.{i}", 1))
                network.connect(host, routers[-1], self.port_gbps, 0.0)
                network.connect(routers[-1], rack, self.nic_gbps, self.delay_us)
            for i in range(2 * HALF):
                half = i // HALF * HALF
                for j in [*range(i + 1, half + HALF), *([i + HALF] if i < HALF else [])]:
                    network.connect(routers[i], routers[j], self.mesh_gbps, self.mesh_delay_us)
        return network
