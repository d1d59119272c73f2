"""The fat-tree of k-port switches (Al-Fares et al. 2008): k³/4 hosts, no oversubscription."""

from __future__ import annotations

from dataclasses import dataclass

from luban.core.errors import ConfigError
from luban.netsim.topology.base import Topology
from luban.netsim.topology.clos import Clos
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class FatTree(Topology):
    """A fat-tree of k-port switches."""

    k: int = 4  # ports a switch; an even number
    gbps: float = 100.0  # of every link

    def build(self) -> Network:
        """k pods of k/2 leaves and k/2 aggregation switches below (k/2)² cores."""
        if self.k < 2 or self.k % 2:
            raise ConfigError(f"topology.k must be an even number from 2, {self.k} given")
        half = self.k // 2
        return Clos(
            pods=self.k,
            leaves_per_pod=half,
            aggs_per_pod=half,
            cores_per_group=half,
            hosts_per_leaf=half,
            host_gbps=self.gbps,
            fabric_gbps=self.gbps,
            delay_us=self.delay_us,
        ).build()
