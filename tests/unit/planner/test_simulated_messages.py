"""Messages between nodes priced by the network simulator, against arithmetic and closed forms."""

import numpy as np
import pytest

from luban.cli.plan_prices import network_of
from luban.core.errors import ConfigError, LubanError, UsageError
from luban.netsim.congestion.constant import Constant
from luban.netsim.switches import Switches
from luban.netsim.topology.base import Topology
from luban.netsim.topology.clos import LeafSpine
from luban.netsim.topology.rails import Rails
from luban.planner.cluster import Cluster, Link
from luban.planner.machine import MachineTable
from luban.planner.search.messages import Axis, Messages
from luban.planner.search.simulated import SimulatedMessages

TABLE = MachineTable(gpu="a100-80gb", source="test", matmul=((1, 1.0),), links=1.0, network=0.9)
CLUSTER = Cluster(gpu="a100-80gb", nodes=4, gpus_per_node=8, between=Link(bandwidth=12.5, latency_us=6))
RAILS = Rails(servers=4, gpus=8, servers_per_leaf=4, spines=1, nic_gbps=100.0, spine_gbps=400.0)


def over(topology, way, transport=None):
    transport = transport or Constant(payload=4096, header=1)
    return SimulatedMessages(
        CLUSTER, TABLE, network=topology.network(), transport=transport, switches=Switches(), way=way
    )


@pytest.mark.parametrize("way", ["fluid", "packets"])
@pytest.mark.parametrize("collective", ["all-reduce", "all-gather", "send", "all-to-all"])
def test_a_network_that_nothing_shares_has_the_closed_forms_prices(way, collective):
    """Rails of one leaf: every ring of nodes has links of its own. Fluid rates exactly, packets but for what the first waits for."""
    size = float(np.random.default_rng(1).integers(10**7, 10**8))
    for axis in (Axis(4, 8), Axis(32, 1), Axis(2, 16)):
        expected = Messages(CLUSTER, TABLE).seconds(collective, size, axis)
        found = over(RAILS, way).seconds(collective, size, axis)
        assert found == pytest.approx(expected, rel=1e-6 if way == "fluid" else 0.06)


@pytest.mark.parametrize(("way", "within"), [("fluid", 1e-6), ("packets", 0.05)])
def test_a_leafs_gpus_share_its_uplinks(way, within):
    """Eight flows of 100 Gb/s over one link of 100 Gb/s between leaves; the bytes take eight times as long, α once a message."""
    one = LeafSpine(leaves=4, hosts_per_leaf=8, spines=1, spine_gbps=100)
    size, nodes = 64e6, 4
    expected = (nodes - 1) * (8 * size / nodes / (12.5e9 * 0.9) + 6e-6)
    assert over(one, way).crossing("ring", size, Axis(4, 8)) == pytest.approx(expected, rel=within)
    assert over(one, way).crossing("send", size, Axis(4, 8)) == pytest.approx(
        8 * size / (12.5e9 * 0.9) + 6e-6, rel=within
    )


def test_hashes_that_collide_slow_a_ring_in_both_ways_alike():
    spines = LeafSpine(leaves=4, hosts_per_leaf=8, spines=8, spine_gbps=100)
    fluid, packets = (over(spines, way).crossing("ring", 64e6, Axis(4, 8)) for way in ("fluid", "packets"))
    assert fluid > 1.5 * Messages(CLUSTER, TABLE).crossing("ring", 64e6, Axis(4, 8))
    assert packets == pytest.approx(fluid, rel=0.15)


def test_packets_of_large_messages_go_on_along_the_line():
    """A price for messages of 1.6 MB, simulated in part, beside the same simulated whole."""
    messages, axis = over(RAILS, "packets"), Axis(4, 8)
    size = 4 * 1.6 * (1 << 20)
    pairs = messages._pairs("ring", axis)
    whole = messages._simulated("ring", size / 4, axis, pairs)
    assert messages._sent("ring", size / 4, axis, pairs) == pytest.approx(whole, rel=0.01)


def test_networks_that_cannot_carry_a_plan_are_said():
    small = LeafSpine(leaves=2, hosts_per_leaf=8, spines=8)
    with pytest.raises(ConfigError, match="the network's topology has 16 hosts, and a ring of the plan has 32 GPUs"):
        over(small, "fluid").seconds("all-gather", 4e9, Axis(32, 1))
    stuck = over(RAILS, "packets")
    for link in range(len(stuck.network.links)):
        stuck.network.failed.add(link)  # after paths were chosen nothing arrives
    stuck._paths = {pair: over(RAILS, "fluid")._path(*pair) for pair in stuck._pairs("ring", Axis(4, 8))}
    with pytest.raises(LubanError, match="do not arrive: no working path"):
        stuck.crossing("ring", 1e6, Axis(4, 8))


def test_a_network_with_variants_is_refused_by_name():
    with pytest.raises(UsageError, match=r"--network eflops_nic has variants \(.+, .+\): name a scenario without"):
        network_of("eflops_nic", CLUSTER)
    assert isinstance(network_of("hcc", CLUSTER).topology, Topology)
