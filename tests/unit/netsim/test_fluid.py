"""Max-min fairness against arithmetic, its definition, and packets."""

import numpy as np
import pytest
from netsim_networks import MILLISECOND

from luban.core.errors import DataError
from luban.netsim.congestion.constant import Constant
from luban.netsim.congestion.hpcc import Hpcc
from luban.netsim.engine.paths import Segments, flow_paths
from luban.netsim.flows import Flow
from luban.netsim.fluid import max_min_rates, solve
from luban.netsim.fluid_flows import fluid_times
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.clos import LeafSpine, Star
from luban.netsim.topology.rails import Rails
from luban.netsim.workloads.collective import Collective
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


def test_rates_are_in_proportion_to_weights_and_shares_load_links():
    assert max_min_rates([[0], [0], [0, 1]], np.array([12.0, 1.0]), [1, 2, 3]) == pytest.approx(
        [11 / 3, 22 / 3, 1.0], rel=1e-9
    )
    # The first flow is sprayed over two links, the second has one of them to itself otherwise.
    start, links = np.array([0, 2, 3]), np.array([0, 1, 1], np.int32)
    rates = solve(start, links, np.array([1.0, 1.0]), shares=np.array([0.5, 0.5, 1.0]))
    assert rates == pytest.approx([2 / 3, 2 / 3], rel=1e-9)


def star(hosts, delay_us=0.0):
    return Star(hosts=hosts, delay_us=delay_us).network()


def fluid(network, flows, **options):
    rng = np.random.default_rng(0)
    paths = [[] if f.duration is not None else [network.hashed_path(f.src, f.dst, rng)] for f in flows]
    return fluid_times(network, paths, flows, **options)


MEGABYTE = 1e6 / (100e9 / 8)  # seconds on a link


def test_times_follow_rates():
    found = fluid(star(4), [Flow(0, 3, 10**9), Flow(1, 3, 10**9), Flow(2, 3, 2 * 10**9)])
    assert found.finish == pytest.approx([3000 * MEGABYTE, 3000 * MEGABYTE, 4000 * MEGABYTE], rel=1e-9)


def test_flows_start_when_it_is_their_turn():
    """By hand: alone for 40 µs, then two on one link, one of them alone again at the end."""
    flows = [Flow(0, 2, 10**6), Flow(1, 2, 10**6, start=40 * 10**6)]
    found = fluid(star(3, 0.5), flows)  # a link's delay is 0.5 µs
    half = 10**6 - 100e9 / 8 * 40e-6  # bytes that the first has left when the second starts
    first = 40e-6 + 2 * half * MEGABYTE / 1e6
    second = first + (10**6 - half) * MEGABYTE / 1e6
    assert found.began == pytest.approx([0.0, 40e-6]) and found.finish == pytest.approx(
        [first + 1e-6, second + 1e-6], rel=1e-9
    )


def test_weights_count_where_they_are_asked_for():
    flows = [Flow(0, 2, 3 * 10**6, weight=3.0), Flow(1, 2, 10**6)]
    assert fluid(star(3), flows, weighted=True).finish == pytest.approx([4 * MEGABYTE] * 2, rel=1e-9)
    assert fluid(star(3), flows).finish == pytest.approx([4 * MEGABYTE, 2 * MEGABYTE], rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_graph_of_flows_takes_as_long_as_an_interpreter_of_its_definition_says(seed):
    """Random flows and work that start late and wait for others, against time steps that solve all rates anew in Python."""
    rng = np.random.default_rng(seed)
    network, flows = LeafSpine(leaves=2, spines=2, hosts_per_leaf=3, delay_us=0.0).network(), []
    for i in range(40):
        src, dst = (int(x) for x in rng.choice(6, 2, replace=False))
        after = tuple(sorted({int(rng.integers(i)) for _ in range(int(rng.integers(0, 3)))})) if i else ()
        start = int(rng.integers(0, 50)) * 10**6
        duration = int(rng.integers(0, 30)) * 10**6 if rng.random() < 0.2 else None
        flows.append(Flow(src, dst, int(rng.integers(10**4, 10**6)), start=start, after=after, duration=duration))
    paths = [network.hashed_path(f.src, f.dst, rng) for f in flows]
    found = fluid_times(network, [[p] if f.duration is None else [] for p, f in zip(paths, flows, strict=True)], flows)
    assert found.finish == pytest.approx(interpreted(network, paths, flows), rel=1e-9)


def interpreted(network, paths, flows):
    """When each flow has finished, in seconds."""
    capacity = np.repeat([link.rate * 1.25e5 for link in network.links], 2)
    left, done, now = [float(f.size) for f in flows], {}, 0.0
    while len(done) < len(flows):
        ready = {
            i: max((done[j] for j in f.after), default=0.0) + f.start / 1e12
            for i, f in enumerate(flows)
            if i not in done and all(j in done for j in f.after)
        }
        active = [i for i, t in ready.items() if t <= now + 1e-15 and flows[i].duration is None]
        rates = dict(zip(active, max_min_rates([paths[i] for i in active], capacity), strict=True)) if active else {}
        moments = [now + left[i] / rates[i] for i in active]
        moments += [t for t in ready.values() if t > now + 1e-15]
        moments += [t + flows[i].duration / 1e12 for i, t in ready.items() if flows[i].duration is not None]
        later = min(moments)
        for i in active:
            left[i] -= rates[i] * (later - now)
            if left[i] <= 1e-9 * flows[i].size:
                done[i] = later
        for i, t in ready.items():
            if flows[i].duration is not None and t + flows[i].duration / 1e12 <= later + 1e-15:
                done[i] = t + flows[i].duration / 1e12
        now = later
    return [done[i] for i in range(len(flows))]


def test_a_graph_that_waits_in_a_circle_and_a_flow_without_a_path_are_said():
    with pytest.raises(DataError, match="wait for each other in a circle"):
        fluid(star(3), [Flow(0, 1, 10, after=(1,)), Flow(1, 2, 10, after=(0,))])
    with pytest.raises(DataError, match="flow 0 has no path"):
        fluid_times(star(3), [[]], [Flow(0, 1, 10)])


@pytest.mark.parametrize(
    ("algorithm", "within"),
    [
        ("ring", 0.05),
        ("halving_doubling", 0.05),
        ("all_to_all", 0.05),
        ("tree", 0.1),
    ],  # of a tree several chunks share a port
)
def test_collectives_take_as_long_as_packets_say(algorithm, within):
    network = LeafSpine(leaves=2, spines=2, hosts_per_leaf=4).network()
    work = Collective(algorithm=algorithm, bytes=8_000_000, alpha_us=3.0)
    flows = work.flows(network, np.random.default_rng(0))
    transport = Constant(payload=4096, header=1, ack_size=1)
    simulation = Simulation(network, flows, transport, Switches(buffer_bytes=1 << 28))
    assert simulation.run().complete
    chosen = flow_paths(network, transport, flows, Segments(network, flows, 0), 0)[0]  # the same hashes
    assert fluid_times(network, [[path] for path in chosen], flows).finish.max() == pytest.approx(
        simulation.makespan(), rel=within
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


SERVERS, PER_LEAF, SPINES, GPUS = 2048, 32, 32, 8


def rails_permutation(rng):
    """A permutation among the 16,384 GPUs of a rail-optimised cluster with one link from each leaf to each spine: of each flow
    the leaf that it leaves from and the one that it goes to."""
    hosts = SERVERS * GPUS
    src, dst = np.arange(hosts), np.array(derangement(hosts, rng))
    leaf = (src // GPUS // PER_LEAF) * GPUS + src % GPUS
    return dst, leaf[src], leaf[dst]


def rates_over(spines, dst, a, b):
    """Max-min fair rates in line rates, of flows each over the given spines (flows, n), a part of it over each."""
    hosts, leaves, n = len(dst), SERVERS * GPUS // PER_LEAF, spines.shape[1]
    crossing, links, shares = a != b, [], []
    for i in range(hosts):
        links += [i, hosts + dst[i]]
        shares += [1.0, 1.0]
        if crossing[i]:
            links += (2 * hosts + a[i] * SPINES + spines[i]).tolist()
            links += (2 * hosts + (leaves + b[i]) * SPINES + spines[i]).tolist()
            shares += [1 / n] * (2 * n)
    start = np.concatenate([[0], np.cumsum(2 + 2 * n * crossing)])
    capacity = np.ones(2 * hosts + 2 * leaves * SPINES)
    return solve(start, np.array(links, np.int32), capacity, shares=np.array(shares))


def planned_spines(a, b):
    """A spine for each flow so that no link carries two: the edges of a bipartite graph of leaves, coloured by alternating paths
    (König), as many colours as a leaf has flows."""
    up, down, spine = {}, {}, np.full(len(a), -1)
    for i in np.flatnonzero(a != b):
        free = next(c for c in range(SPINES) if (a[i], c) not in up)
        other = next(c for c in range(SPINES) if (b[i], c) not in down)
        chain, here, leaf, colour = [], down, b[i], free
        while (leaf, colour) in here:  # flows of the two colours by turns: they change places
            chain.append(here[leaf, colour])
            leaf = a[chain[-1]] if here is down else b[chain[-1]]
            here, colour = (up if here is down else down), (other if colour == free else free)
        for flow in chain:
            del up[a[flow], spine[flow]], down[b[flow], spine[flow]]
        for flow in [*chain, i]:
            spine[flow] = free if flow == i else (other if spine[flow] == free else free)
            up[a[flow], spine[flow]] = down[b[flow], spine[flow]] = flow
    return spine


def test_a_permutation_of_16384_gpus_hashed_sprayed_and_planned():
    rng = np.random.default_rng(0)
    dst, a, b = rails_permutation(rng)
    hashed = rates_over(rng.integers(SPINES, size=(len(dst), 1)), dst, a, b)
    assert hashed.mean() == pytest.approx(0.52, abs=0.03)
    sprayed = rates_over(np.tile(np.arange(SPINES), (len(dst), 1)), dst, a, b)
    assert sprayed.mean() >= 0.95
    planned = rates_over(planned_spines(a, b)[:, None], dst, a, b)
    assert planned == pytest.approx(np.ones(len(dst)), rel=1e-9)


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
