"""What arithmetic says exactly: single packets, queues, determinism, conservation."""

import itertools

import numpy as np
import pytest
from netsim_networks import MICROSECOND, incast

from luban.netsim.congestion.constant import Constant
from luban.netsim.congestion.dctcp import Dctcp
from luban.netsim.flows import Flow
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.graph import Graph


@pytest.mark.parametrize("seed", range(4))
def test_a_single_packet_takes_exactly_its_serialisations_and_delays(seed):
    """A packet over a chain of links, each with a rate and a delay of its own; a bit takes 10^6 / (Mb/s) ps, a link whole ones."""
    rng = np.random.default_rng(seed)
    hops, size, start = int(rng.integers(1, 7)), int(rng.integers(1, 1001)), int(rng.integers(10**6))
    rates = [int(rng.choice([1, 10, 25, 40, 100, 200, 400])) for _ in range(hops + 1)]
    delays = [int(rng.integers(0, 5000)) for _ in range(hops + 1)]  # ns
    nodes = ["hosta", *(f"switch{i}" for i in range(hops)), "hostb"]
    links = zip(itertools.pairwise(nodes), rates, delays, strict=True)
    network = Graph(links=tuple(f"{a} {b} {rate} {delay / 1000}" for (a, b), rate, delay in links)).network()
    simulation = Simulation(network, [Flow(0, 1, size, start=start)], Constant(header=48))
    assert simulation.run().complete
    bits = 8 * (size + 48)
    expected = start + sum(bits * 1000 // rate + 1000 * delay for rate, delay in zip(rates, delays, strict=True))
    assert int(simulation.state.flows["finish"][0]) == expected


SENDERS = 40
SERVICE = MICROSECOND  # of a packet of 1250 bytes at 10 Gb/s
FIRST_LINK = 1000  # ps of the same packet on a sender's link of 10 Tb/s


def poisson_source(rng, packets, load):
    """Packets of random senders, by a Poisson process, over fast links into one port of 10 Gb/s: when each was sent and had
    arrived, ps, by sender and number."""
    links = [f"host{i} switch 10000 0" for i in range(SENDERS)] + ["switch hostlast 10 0"]
    network = Graph(links=tuple(links)).network()
    # Given their number in a span of time, the moments of a Poisson process are uniform: that takes chance out of the load.
    starts = np.sort(rng.uniform(0, packets * SERVICE / load, packets)).astype(np.int64)
    senders = rng.integers(SENDERS, size=packets)
    routes = [network.hashed_path(i, SENDERS, rng) for i in range(SENDERS)]
    flows = [
        Flow(i, SENDERS, 1202, start=t, route=routes[i]) for i, t in zip(senders.tolist(), starts.tolist(), strict=True)
    ]
    transport = Constant(payload=1202, header=48)
    simulation = Simulation(network, flows, transport, Switches(flow_control="lossy", alpha=1e9))
    assert simulation.run().complete
    return starts, senders, simulation.state.flows["finish"].copy()


def lindley(arrivals, service):
    """Departure times of a queue with one server and fixed service times, arrivals in order."""
    index = np.arange(len(arrivals))
    return np.maximum.accumulate(arrivals - index * service) + (index + 1) * service


def test_a_port_is_a_queue_with_one_server_to_the_picosecond():
    starts, senders, finish = poisson_source(np.random.default_rng(5), 4000, 0.8)
    # Each sender's link is such a queue, and what leaves them arrives at the port.
    at_port = np.sort(np.concatenate([lindley(starts[senders == i], FIRST_LINK) for i in range(SENDERS)]))
    assert (np.sort(finish) == lindley(at_port, SERVICE)).all()


@pytest.mark.parametrize(("load", "packets"), [(0.5, 60_000), (0.8, 150_000), (0.9, 300_000)])
def test_waits_of_a_poisson_source_are_those_of_m_d_1(load, packets):
    """What the simulated packets waited, against Pollaczek and Khinchine: load / (2 (1 - load)) services in the mean. The sizes
    are such that chance alone is 0.7 to 2%."""
    starts, _, finish = poisson_source(np.random.default_rng(2), packets, load)
    waits = (finish - starts - FIRST_LINK - SERVICE) / SERVICE
    assert waits.min() >= 0
    assert waits.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.03)


def test_the_same_seed_gives_the_same_run_and_another_another():
    def run(seed):
        switches = Switches(flow_control="lossy", buffer_bytes=200_000)
        simulation = incast(12, Dctcp(), switches, gbps=10.0, size=300_000, seed=seed)
        return simulation.state.flows["finish"].tolist(), int(simulation.state.world[0]["events"])

    assert run(3) == run(3)
    assert run(3) != run(4)


@pytest.mark.parametrize("flow_control", ["lossy", "pfc", "credits"])
def test_nothing_is_lost_or_made(flow_control):
    switches = Switches(flow_control=flow_control, buffer_bytes=1_000_000, port_bytes=100_000)
    simulation = incast(8, Dctcp(), switches, gbps=10.0, size=500_000)
    state = simulation.state
    assert (state.flows["received"] == state.flows["size"]).all()
    assert state.flows["arrived"].sum() == state.arrived.sum()
    sent = simulation.state.world[0]["delivered"] + state.ports["drops"].sum()
    assert sent == state.flows["packets"].sum() + state.flows["retransmits"].sum()
    assert (state.ports["drops"].sum() > 0) == (flow_control == "lossy")
    # When the last acknowledgements have come home every packet is back in the pool, and every buffer empty.
    state.world["unfinished"] = 1
    simulation.run(until=int(state.world[0]["now"]) + 10**9)
    assert state.world[0]["free_count"] == len(state.packets)
    assert state.nodes["used"].sum() == 0 and state.queues["bytes"].sum() == 0
