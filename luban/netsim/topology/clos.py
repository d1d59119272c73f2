"""Stars, chains, and Clos networks of two and three tiers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from luban.netsim.topology.base import Topology
from luban.netsim.topology.network import Network


@dataclass(frozen=True, kw_only=True)
class Star(Topology):
    """Hosts around one switch."""

    hosts: int = 16
    host_gbps: float = 100.0  # of a host's link

    def build(self) -> Network:
        """Hosts around one switch."""
        self.require(hosts=2)
        network = Network()
        switch = network.add_switch("switch")
        for i in range(self.hosts):
            network.connect(network.add_host(f"host{i}"), switch, self.host_gbps, self.delay_us)
        return network


@dataclass(frozen=True, kw_only=True)
class Chain(Topology):
    """Switches in a row, `hosts` at either end: the left ones first."""

    switches: int = 2
    hosts: int = 1  # at either end
    host_gbps: float = 100.0  # of a host's link
    link_gbps: float = 100.0  # between switches

    def build(self) -> Network:
        """Switches in a row."""
        self.require(switches=1, hosts=1)
        network = Network()
        row = [network.add_switch(f"switch{i}") for i in range(self.switches)]
        for side, switch in (("left", row[0]), ("right", row[-1])):
            for i in range(self.hosts):
                network.connect(network.add_host(f"{side}{i}"), switch, self.host_gbps, self.delay_us)
        for a, b in itertools.pairwise(row):
            network.connect(a, b, self.link_gbps, self.delay_us)
        return network


@dataclass(frozen=True, kw_only=True)
class LeafSpine(Topology):
    """Two tiers: every leaf joined to every spine."""

    leaves: int = 4
    spines: int = 4
    hosts_per_leaf: int = 4
    host_gbps: float = 100.0  # of a host's link
    spine_gbps: float = 100.0  # of a link between leaf and spine

    def build(self) -> Network:
        """Every leaf joined to every spine."""
        self.require(leaves=1, spines=1, hosts_per_leaf=1)
        network = Network()
        leaves = [network.add_switch(f"leaf{i}", 1) for i in range(self.leaves)]
        spines = [network.add_switch(f"spine{i}", 2) for i in range(self.spines)]
        for i, leaf in enumerate(leaves):
            for j in range(self.hosts_per_leaf):
                host = network.add_host(f"host{i * self.hosts_per_leaf + j}")
                network.connect(host, leaf, self.host_gbps, self.delay_us)
        for leaf in leaves:
            for spine in spines:
                network.connect(leaf, spine, self.spine_gbps, self.delay_us)
        return network

    @property
    def oversubscription(self) -> float:
        """Bandwidth into a leaf from its hosts over that to the spines."""
        return self.hosts_per_leaf * self.host_gbps / (self.spines * self.spine_gbps)


@dataclass(frozen=True, kw_only=True)
class Clos(Topology):
    """Three tiers: pods of leaves and aggregation switches, cores in as many groups as a pod has aggregation switches. The
    defaults are the network of HPCC's simulations: 320 hosts, 56 switches."""

    pods: int = 5
    leaves_per_pod: int = 4
    aggs_per_pod: int = 4
    cores_per_group: int = 4
    hosts_per_leaf: int = 16
    host_gbps: float = 100.0  # of a host's link
    fabric_gbps: float = 400.0  # of a link between switches

    def build(self) -> Network:
        """Pods below groups of cores."""
        self.require(pods=1, leaves_per_pod=1, aggs_per_pod=1, cores_per_group=1, hosts_per_leaf=1)
        network = Network()
        groups = [
            [network.add_switch(f"core{g * self.cores_per_group + c}", 3) for c in range(self.cores_per_group)]
            for g in range(self.aggs_per_pod)
        ]
        for pod in range(self.pods):
            leaves = [network.add_switch(f"leaf{pod * self.leaves_per_pod + i}", 1) for i in range(self.leaves_per_pod)]
            for leaf in leaves:
                for _ in range(self.hosts_per_leaf):
                    host = network.add_host(f"host{len(network.hosts)}")
                    network.connect(host, leaf, self.host_gbps, self.delay_us)
            for i, group in enumerate(groups):
                agg = network.add_switch(f"agg{pod * self.aggs_per_pod + i}", 2)
                for below in leaves:
                    network.connect(below, agg, self.fabric_gbps, self.delay_us)
                for core in group:
                    network.connect(agg, core, self.fabric_gbps, self.delay_us)
        return network
