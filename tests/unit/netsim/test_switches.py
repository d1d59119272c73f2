"""Shared buffers: headroom, deadlock, credits, classes, control packets, bad configuration."""

from dataclasses import replace

import numpy as np
import pytest
from netsim_networks import MICROSECOND, MILLISECOND, incast, path_through

from luban.core.errors import ConfigError
from luban.netsim.congestion.constant import Constant
from luban.netsim.flows import Flow
from luban.netsim.results import summary
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.clos import Star
from luban.netsim.topology.graph import Graph
from luban.netsim.workloads.collective import Collective


def test_enough_headroom_loses_nothing_and_too_little_does():
    long_cable = {"delay_us": 5.0, "size": 400_000}
    needed = Switches().needed_headroom(100_000, 5 * MICROSECOND, 1048)
    assert needed == 2 * 62_500 + 2 * 1048 + 64
    enough = incast(16, Constant(), Switches(headroom_bytes=needed, buffer_bytes=6_000_000), **long_cable)
    assert enough.state.ports["pauses"].sum() > 0
    assert enough.state.ports["drops"].sum() == 0
    little = Switches(headroom_bytes=needed // 2, buffer_bytes=6_000_000, allow_small_headroom=True)
    assert incast(16, Constant(), little, **long_cable).state.ports["drops"].sum() > 0


def test_a_headroom_too_small_for_the_cable_is_refused_with_the_number_needed():
    with pytest.raises(ConfigError, match=r"headroom_bytes 10000 is too small for .* 127160 are needed"):
        incast(2, Constant(), Switches(headroom_bytes=10_000), delay_us=5.0)


def test_buffers_that_hold_no_packet_are_refused():
    with pytest.raises(ConfigError, match="holds no packet: one has 1048 bytes"):
        incast(2, Constant(), Switches(flow_control="lossy", buffer_bytes=1000))
    with pytest.raises(ConfigError, match="holds no packet: one has 1048 bytes"):
        incast(2, Constant(), Switches(flow_control="lossy", port_bytes=100))
    with pytest.raises(ConfigError, match="two packets"):
        incast(2, Constant(), Switches(flow_control="credits", credit_bytes=1000))
    with pytest.raises(ConfigError, match=r"use --switch.buffer_bytes \d+"):
        incast(16, Constant(), Switches(buffer_bytes=100_000))


def circle(switches):
    """Three switches in a circle; each host sends over two of their links, all the same way round."""
    links = [f"host{i} s{i} 100 1" for i in range(3)] + ["s0 s1 100 1", "s1 s2 100 1", "s2 s0 100 1"]
    network = Graph(links=tuple(links)).network()
    node = {name: i for i, name in enumerate(network.names)}
    around = [[node[f"s{(i + k) % 3}"] for k in range(3)] for i in range(3)]
    flows = [Flow(i, (i + 2) % 3, 3_000_000, route=path_through(network, i, around[i], (i + 2) % 3)) for i in range(3)]
    return Simulation(network, flows, Constant(), switches)


@pytest.mark.parametrize(
    ("switches", "kind"),
    [(Switches(buffer_bytes=400_000), "PFC"), (Switches(flow_control="credits", credit_bytes=20_000), "credit")],
)
def test_a_deadlock_ends_the_run_and_its_ports_are_named(switches, kind):
    simulation = circle(switches)
    outcome = simulation.run()
    assert not outcome.complete
    assert set(outcome.deadlock) == {"s0→s1", "s1→s2", "s2→s0"} and outcome.deadlock[0] == outcome.deadlock[-1]
    assert outcome.reason.startswith(f"{kind} deadlock at ") and " waits for ".join(outcome.deadlock) in outcome.reason
    found = summary(simulation, outcome)
    assert found["deadlock"] == list(outcome.deadlock) and found["flows_finished"] == 0 and found["bytes_received"] > 0


def test_dropping_instead_of_pausing_has_no_deadlock():
    assert circle(Switches(flow_control="lossy", buffer_bytes=400_000)).run().complete


def test_credits_lose_nothing_and_bound_the_buffer():
    simulation = incast(8, Constant(), Switches(flow_control="credits", credit_bytes=64_000), size=500_000)
    assert simulation.state.ports["drops"].sum() == 0
    assert simulation.state.nodes["max_used"].max() <= 8 * 64_000
    assert simulation.state.ports["pauses"].sum() == 0
    assert simulation.makespan() < 1.02 * 8 * 500 * 1048 * 8 / 100e9  # the port never waits for credit


def test_classes_share_by_their_weights():
    network = Star(hosts=4).network()
    flows = [Flow(i + 1, 0, 10**9, cls=i + 1) for i in range(3)]
    switches = Switches(class_weights=(1.0, 2.0, 5.0), buffer_bytes=50_000_000)
    simulation = Simulation(network, flows, Constant(), switches, watched_flows=range(3), sample_every=MICROSECOND)
    simulation.run(2 * MILLISECOND)
    received = simulation.samples()[2][-1]
    assert received / received[0] == pytest.approx([1, 2, 5], rel=0.03)


def test_acknowledgements_pass_before_data_if_they_have_priority():
    """A few packets one way while the other way is full: without priority their acknowledgements queue behind data."""

    def rtt(priority):
        links = ("host0 s0 100 1", "host1 s1 100 1", "host2 s1 100 1", "host3 s0 100 1", "s0 s1 100 1")
        network = Graph(links=links).network()
        flows = [Flow(1, 0, 10**8), Flow(2, 3, 10**8), Flow(0, 2, 50_000, start=MILLISECOND)]
        simulation = Simulation(network, flows, Constant(window_bdp=8.0, ack_priority=priority))
        simulation.run(2 * MILLISECOND)
        return simulation.state.flows["srtt"][2] / MICROSECOND

    assert rtt(True) < 15 < 40 < rtt(False)


def test_every_byte_over_an_oversubscribed_port_is_either_delivered_or_dropped_there():
    switches = Switches(flow_control="lossy", buffer_bytes=500_000, alpha=0.5)
    simulation = incast(4, Constant(window_bdp=2.0, recovery="selective"), switches, size=1_000_000)
    assert np.flatnonzero(simulation.state.ports["drops"]).tolist() == [1]
    assert simulation.state.ports["max_queue"][1] <= 500_000 * 0.5 / 1.5 + 1048


def test_one_job_over_infiniband_and_over_roce():
    """An all-to-all, whose receivers are never overrun for long: both kinds of lossless network carry it at line rate."""
    network = Star(hosts=8).network()
    flows = Collective(algorithm="all_to_all", bytes=4_000_000).flows(network, np.random.default_rng(0))
    took = {}
    for flow_control in ("pfc", "credits"):
        simulation = Simulation(network, [replace(f) for f in flows], Constant(), Switches(flow_control=flow_control))
        assert simulation.run().complete
        assert simulation.state.ports["drops"].sum() == 0
        took[flow_control] = simulation.makespan()
    ideal = 7 * 500 * 1048 * 8 / 100e9
    assert took["pfc"] == pytest.approx(ideal, rel=0.15) and took["credits"] == pytest.approx(ideal, rel=0.15)
