"""What arithmetic says exactly: single packets, queues, determinism, conservation."""

import numpy as np
import pytest
from netsim_networks import MICROSECOND, incast

from luban.netsim.congestion.constant import Constant
from luban.netsim.congestion.dctcp import Dctcp
from luban.netsim.flows import Flow
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.clos import Chain
from luban.netsim.topology.graph import Graph


@pytest.mark.parametrize("switches", [1, 2, 5])
def test_a_single_packet_takes_exactly_its_serialisations_and_delays(switches):
    size, gbps, delay = 777, 25.0, 3.5
    network = Chain(switches=switches, host_gbps=gbps, link_gbps=gbps, delay_us=delay).network()
    simulation = Simulation(network, [Flow(0, 1, size, start=123)], Constant())
    assert simulation.run().complete
    links = switches + 1
    expected = 123 + links * ((size + Constant().header) * 8 * 40 + round(delay * MICROSECOND))  # 40 ps a bit
    assert int(simulation.state.flows["finish"][0]) == expected


def queue_of_arrivals(rng, packets, load):
    """Single-packet flows of random senders over fast links into one port of 10 Gb/s; arrival times at the queue, waits."""
    senders = 40
    links = [f"host{i} switch 10000 0" for i in range(senders)] + ["switch hostlast 10 0"]
    transport = Constant(payload=1202, header=48)  # 1 µs at 10 Gb/s
    starts = np.cumsum(rng.exponential(MICROSECOND / load, packets)).astype(np.int64)
    flows = [Flow(int(rng.integers(senders)), senders, 1202, start=int(t)) for t in starts]
    simulation = Simulation(
        Graph(links=tuple(links)).network(), flows, transport, Switches(flow_control="lossy", alpha=1e9)
    )
    assert simulation.run().complete
    finish = np.sort(simulation.state.flows["finish"])
    return starts + 1250 * 8 // 10, finish


def lindley(arrivals, service):
    """Departure times of a queue with one server and fixed service times."""
    index = np.arange(len(arrivals))
    return np.maximum.accumulate(arrivals - index * service) + (index + 1) * service


def test_a_port_is_a_queue_with_one_server_to_the_picosecond():
    arrivals, finish = queue_of_arrivals(np.random.default_rng(5), 4000, 0.8)
    # Packets of one sender that start within a packet's time of each other queue at the sender, for less than a nanosecond.
    assert np.abs(finish - lindley(arrivals, MICROSECOND)).max() <= 1000


@pytest.mark.parametrize("load", [0.5, 0.8, 0.9])
def test_waits_are_those_of_m_d_1(load):
    arrivals = np.cumsum(np.random.default_rng(2).exponential(1 / load, 4_000_000))
    waits = lindley(arrivals, 1.0) - arrivals - 1.0
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
