"""Links that fail while packets are on them, and come back or not."""

import json

import numpy as np
import pytest

from luban.cli.main import main
from luban.netsim.congestion.constant import Constant
from luban.netsim.engine import layout as at
from luban.netsim.flows import Flow
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.clos import Star

MICROSECOND = 1_000_000  # ps


def simulation(flow_control: str, link: int, bytes_: int = 400_000, **fields) -> Simulation:
    flows = [Flow(1, 0, bytes_), Flow(2, 0, bytes_)]
    found = Simulation(Star(hosts=3).network(), flows, Constant(**fields), Switches(flow_control=flow_control), seed=3)
    found.run(15 * MICROSECOND)
    found.fail_link(link)
    return found


@pytest.mark.parametrize("flow_control", ["credits", "pfc"])
@pytest.mark.parametrize("link", [0, 1])
@pytest.mark.parametrize("ack_priority", [True, False])
def test_a_repaired_link_carries_every_flow_to_its_end_and_no_credit_is_lost(flow_control, link, ack_priority):
    sim = simulation(flow_control, link, ack_priority=ack_priority)
    sim.run(100 * MICROSECOND)
    sim.repair_link(link)
    outcome = sim.run(200_000 * MICROSECOND)
    assert outcome.complete, outcome.reason
    assert (
        sim.state.ports["drops"][2 * link : 2 * link + 2].sum() > 0
        and sim.state.flows["received"].tolist() == [400_000] * 2
    )
    sim.state.world["unfinished"] = 1  # what is still on its way arrives
    sim.run(400_000 * MICROSECOND)
    queues, ports = sim.state.queues, sim.state.ports
    assert not queues["ingress"].any() and not ports["paused"].any()
    towards_switch = np.flatnonzero(sim.state.nodes["is_switch"][ports["peer"]])
    if flow_control == "credits":
        for port in towards_switch:
            for cls in range(1, at.CLASSES):
                queue = queues[port * at.CLASSES + cls]
                assert queue["credits"] + queue["owed"] == sim.switches.credit_bytes


def test_a_permanent_failure_ends_and_names_the_flows_without_a_path():
    flows = [Flow(1, 0, 400_000), Flow(2, 0, 400_000), Flow(1, 2, 1000, after=(1,)), Flow(2, 0, 1000, after=(0,))]
    sim = Simulation(Star(hosts=3).network(), flows, Constant(), seed=3, sample_every=MICROSECOND)
    sim.run(15 * MICROSECOND)
    sim.fail_link(1)  # of host 1
    assert not sim.run(300 * MICROSECOND).complete  # with a time given it goes on to it: the link may be repaired then
    outcome = sim.run()
    assert not outcome.complete and outcome.simulated < 0.2
    assert (
        outcome.reason
        == "no working path is left to unfinished flows: 0 (host1→host0), 2 (host1→host2); 1 wait for them"
    )
    assert np.isfinite(sim.finish_times()).tolist() == [False, True, False, False]
    sim.repair_link(1)
    assert sim.run().complete


def test_a_flow_that_starts_long_after_the_failure_is_waited_for():
    late = 300_000 * MICROSECOND
    sim = Simulation(Star(hosts=3).network(), [Flow(1, 0, 400_000), Flow(2, 0, 1000, start=late)], Constant(), seed=3)
    sim.fail_link(1)
    outcome = sim.run()
    assert outcome.reason == "no working path is left to unfinished flows: 0 (host1→host0)"
    assert sim.finish_times()[1] > late / 1e12


def test_the_command_ends_with_1_and_says_which_flows_are_cut_off(capsys):
    words = [
        "simulate",
        "incast",
        "--json",
        "--workload.senders",
        "3",
        "--run.fail_links",
        "1",
        "--run.fail_at_us",
        "20",
    ]
    assert main(words) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["flows_finished"] == found["flows"] - 1 and not found["complete"]
    assert found["reason"] in printed.err and "no working path is left" in found["reason"]
    assert main([*words, "--run.repair_at_us", "300"]) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
