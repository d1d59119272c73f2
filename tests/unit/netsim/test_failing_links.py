"""Links that fail while packets are on them, and come back or not."""

import numpy as np
import pytest

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
    assert sim.state.ports["drops"][2 * link : 2 * link + 2].sum() > 0 and sim.state.flows["received"].tolist() == [400_000] * 2
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
