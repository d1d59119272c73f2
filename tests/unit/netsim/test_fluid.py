"""Max-min fairness against arithmetic, its definition, and packets."""

import numpy as np
import pytest
from netsim_networks import MILLISECOND

from luban.core.errors import DataError
from luban.netsim.congestion.hpcc import Hpcc
from luban.netsim.flows import Flow
from luban.netsim.fluid import fluid_times, max_min_rates
from luban.netsim.simulation import Simulation
from luban.netsim.topology.clos import LeafSpine
from luban.netsim.topology.rails import Rails
from luban.netsim.workloads.permutation import derangement


def test_rates_known_by_hand():
    # A parking lot: one flow over all links, one on each.
    assert max_min_rates([[0, 1, 2], [0], [1], [2]], np.ones(3)) == pytest.approx([0.5] * 4, rel=1e-9)
    # Bertsekas and Gallager's kind of example: the second link is left with what the first one's flows don't take.
    assert max_min_rates([[0], [0], [0, 1], [1]], np.array([1.0, 1.0])) == pytest.approx(
        [1 / 3, 1 / 3, 1 / 3, 2 / 3], rel=1e-9
    )
    assert max_min_rates([[0], [0, 1]], np.array([10.0, 1.0])) == pytest.approx([9, 1], rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_every_flow_has_a_bottleneck(seed):
    """Max-min fairness by its definition: a full link on which no other flow is faster."""
    rng = np.random.default_rng(seed)
    links, flows = 30, 200
    capacity = rng.uniform(0.5, 2, links)
    paths = [rng.choice(links, rng.integers(1, 6), replace=False) for _ in range(flows)]
    rates = max_min_rates(paths, capacity)
    load, fastest = np.zeros(links), np.zeros(links)
    for path, rate in zip(paths, rates, strict=True):
        load[path] += rate
        fastest[path] = np.maximum(fastest[path], rate)
    assert (load <= capacity * (1 + 1e-9)).all()
    for path, rate in zip(paths, rates, strict=True):
        assert any(load[p] >= capacity[p] * (1 - 1e-9) and rate >= fastest[p] * (1 - 1e-9) for p in path)


def test_times_follow_rates():
    network = LeafSpine(leaves=1, spines=1, hosts_per_leaf=4).network()
    paths = [network.path_through(src, [0], 3) for src in range(3)]
    gigabyte = 1e9 / (100e9 / 8)
    assert fluid_times(network, paths, [1e9, 1e9, 2e9]) == pytest.approx(
        [3 * gigabyte, 3 * gigabyte, 4 * gigabyte], rel=1e-9
    )


def test_packets_agree_with_the_fluid_on_long_flows():
    network = LeafSpine(leaves=2, spines=1, hosts_per_leaf=4, spine_gbps=200.0).network()
    flows = [Flow(i, 4 + i, 10**9) for i in range(4)] + [Flow(0, 1, 10**9)]
    rng = np.random.default_rng(0)
    paths = [network.hashed_path(f.src, f.dst, rng) for f in flows]
    capacity = np.repeat([link.rate / 1000 for link in network.links], 2)
    transport = Hpcc(eta=1.0)
    simulation = Simulation(network, flows, transport, watched_flows=range(5), sample_every=10**7)
    simulation.run(4 * MILLISECOND)
    times, _, received = simulation.samples()
    half = len(times) // 2
    rates = (received[-1] - received[half]) * 8 / (times[-1] - times[half]) / 1e9
    share = transport.payload / (transport.payload + transport.header)
    assert rates == pytest.approx(max_min_rates(paths, capacity) * share, rel=0.05)


def rails_permutation(servers, per_leaf, spines, rng):
    """Links of each flow of a permutation among the GPUs of a rail-optimised cluster with one link from each leaf to each spine,
    spines chosen by hash; and the largest number of flows that enter or leave a leaf over spines, in links."""
    gpus = 8
    leaves, hosts = gpus * (servers // per_leaf), servers * gpus
    src, dst = np.arange(hosts), np.array(derangement(hosts, rng))
    leaf = (src // gpus // per_leaf) * gpus + src % gpus
    a, b, spine = leaf[src], leaf[dst], rng.integers(spines, size=hosts)
    paths = []
    for i in src:
        ends = [i, hosts + dst[i]]
        middle = [2 * hosts + a[i] * spines + spine[i], 2 * hosts + (leaves + b[i]) * spines + spine[i]]
        paths.append(ends if a[i] == b[i] else ends + middle)
    crossing = a != b
    most = max(np.bincount(a[crossing]).max(), np.bincount(b[crossing]).max())
    return paths, 2 * hosts + 2 * leaves * spines, most / spines


def test_hashed_paths_halve_a_permutation_of_16384_gpus_and_planned_ones_do_not():
    paths, links, most = rails_permutation(2048, 32, 32, np.random.default_rng(0))
    assert max_min_rates(paths, np.ones(links)).mean() == pytest.approx(0.52, abs=0.03)
    # No leaf has more flows to other leaves than links to spines. By König's theorem the flows can then be dealt to spines so that
    # no link carries two, and sprayed packets load no link above its rate.
    assert most <= 1.0


def test_a_small_cluster_agrees_with_the_graph():
    network = Rails(servers=4, gpus=4, servers_per_leaf=2, spines=2, nvlink_gbps=0.0).network()
    rng = np.random.default_rng(0)
    paths = [network.hashed_path(a, b, rng) for a, b in enumerate(derangement(16, rng))]
    rates = max_min_rates(paths, np.ones(2 * len(network.links)))
    assert rates.min() > 0.2 and rates.max() <= 1.0


def test_paths_over_links_that_do_not_exist_are_refused():
    with pytest.raises(DataError, match="outside of 0 to 1"):
        max_min_rates([[0, 2]], np.ones(2))
    with pytest.raises(DataError, match="without capacity"):
        max_min_rates([[0]], np.zeros(1))
