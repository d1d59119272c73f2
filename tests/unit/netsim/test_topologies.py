"""Numbers of hosts, switches, links and paths; what a topology refuses."""

import numpy as np
import pytest

from luban.core.errors import ConfigError
from luban.netsim.topology.bigraph import BiGraph
from luban.netsim.topology.clos import Clos, LeafSpine, Star
from luban.netsim.topology.dragonfly import Dragonfly
from luban.netsim.topology.fat_tree import FatTree
from luban.netsim.topology.graph import Graph
from luban.netsim.topology.rails import Rails
from luban.netsim.topology.torus import Torus
from luban.netsim.topology.x_man import XMan

RNG = np.random.default_rng(1)


@pytest.mark.parametrize(
    ("topology", "hosts", "switches", "links"),
    [
        (Clos(), 320, 56, 320 + 160),
        (FatTree(k=4), 16, 20, 48),
        (FatTree(k=8), 128, 80, 384),
        (LeafSpine(leaves=4, spines=2, hosts_per_leaf=8), 32, 6, 40),
        (BiGraph(switches=4, hosts_per_switch=4), 32, 8, 32 + 16),
        (Torus(x=3, y=4, z=5), 60, 60, 60 + 180),
        (Torus(x=2, y=2, z=2), 8, 8, 8 + 12),
        (Dragonfly(groups=9, switches=4, hosts_per_switch=2, global_links=2), 72, 36, 72 + 54 + 36),
        (Rails(servers=16, gpus=8, servers_per_leaf=8, spines=4), 128, 16 + 4 + 16, 128 * 2 + 64),
        (XMan(servers=4), 32, 33, 32 + 32 + 4 * 16),
    ],
)
def test_the_parts_are_as_many_as_arithmetic_says(topology, hosts, switches, links):
    network = topology.network()
    assert (len(network.hosts), sum(network.switches), len(network.links)) == (hosts, switches, links)


def brute_force_paths(network, src, dst):
    """All shortest paths by breadth-first search over whole paths."""
    paths = [((), network.hosts[src])]
    while True:
        done = [path for path, node in paths if node == network.hosts[dst]]
        if done:
            return set(done)
        longer = []
        for path, node in paths:
            for port in range(2 * len(network.links)):
                a, b = network.ends(port)
                if a == node and (network.switches[b] or b == network.hosts[dst]):
                    longer.append(((*path, port), b))
        paths = longer


@pytest.mark.parametrize(
    "topology", [FatTree(k=4), BiGraph(switches=3, hosts_per_switch=2), Torus(x=3, y=2, z=2), Dragonfly(groups=3)]
)
def test_shortest_paths_are_those_of_brute_force(topology):
    network = topology.network()
    for _ in range(4):
        src, dst = (int(x) for x in RNG.choice(len(network.hosts), 2, replace=False))
        expected = brute_force_paths(network, src, dst)
        assert set(network.shortest_paths(src, dst, 64, RNG)) == expected
        assert network.hashed_path(src, dst, RNG) in expected


def test_hops_of_a_bigraph():
    network = BiGraph(switches=4, hosts_per_switch=4).network()
    assert len(network.shortest_paths(0, 16, 99, RNG)) == 1  # across: one path, two switches
    assert len(network.hashed_path(0, 16, RNG)) == 3
    assert len(network.shortest_paths(0, 4, 99, RNG)) == 4  # same side: any switch of the other relays
    assert len(network.hashed_path(0, 4, RNG)) == 4


def test_nvlink_is_taken_inside_a_server_and_one_leaf_on_a_rail():
    network = Rails(servers=4, gpus=8).network()
    assert [network.port_name(p) for p in network.hashed_path(0, 1, RNG)] == ["gpu0.0→nvlink0", "nvlink0→gpu0.1"]
    assert [network.port_name(p) for p in network.hashed_path(0, 8, RNG)] == ["gpu0.0→leaf0.0", "leaf0.0→gpu1.0"]
    assert len(network.shortest_paths(0, 9, 99, RNG)) == 8  # another rail: over any spine


def test_failed_links_are_avoided_and_cuts_are_named():
    topology = LeafSpine(leaves=2, spines=2, hosts_per_leaf=1, failed_links=(2,))
    network = topology.network()
    assert all(port >> 1 != 2 for _ in range(20) for port in network.hashed_path(0, 1, RNG))
    with pytest.raises(ConfigError, match="isn't connected: no path from host0 to host1"):
        LeafSpine(leaves=2, spines=1, hosts_per_leaf=1, failed_links=(2,)).network()
    with pytest.raises(ConfigError, match="no link 99"):
        LeafSpine(failed_links=(99,)).network()


def test_mistakes_are_said():
    with pytest.raises(ConfigError, match="isn't connected"):
        Graph(links=("host0 s0 100", "host1 s1 100")).network()
    with pytest.raises(ConfigError, match="NODE NODE GBPS"):
        Graph(links=("host0 s0 fast",)).network()
    with pytest.raises(ConfigError, match="with itself"):
        Graph(links=("host0 host0 1",)).network()
    with pytest.raises(ConfigError, match="even number"):
        FatTree(k=3).network()
    with pytest.raises(ConfigError, match="must be at least 2"):
        Star(hosts=1).network()
    with pytest.raises(ConfigError, match="8 global links"):
        Dragonfly(groups=9, switches=2, global_links=2).network()
    with pytest.raises(ConfigError, match=r"topology\.host_gbps must be at least 0\.001 Gb/s"):
        Star(host_gbps=0.0).network()
    with pytest.raises(ConfigError, match="hosts 0 to 15"):
        Star().network().hashed_path(0, 16, RNG)
