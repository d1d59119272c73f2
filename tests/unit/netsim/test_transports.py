"""Paths and losses: spraying, per-path control, a path that dies, selective repeat, go-back-N."""

import numpy as np
import pytest
from netsim_networks import MILLISECOND

from luban.core.errors import ConfigError, DataError
from luban.netsim.congestion.constant import Constant
from luban.netsim.congestion.hpcc import Hpcc
from luban.netsim.congestion.solar import Solar
from luban.netsim.flows import Flow
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.clos import LeafSpine

LOSSY = Switches(flow_control="lossy", buffer_bytes=200_000)


def leaves(**fields):
    return LeafSpine(leaves=2, spines=4, hosts_per_leaf=4, **fields).network()


def test_spraying_fills_all_spines_where_hashing_fills_some():
    network = leaves()
    flows = [Flow(i, 4 + i, 2_000_000) for i in range(4)]

    def run(**fields):
        simulation = Simulation(network, flows, Constant(**fields), seed=1)
        assert simulation.run().complete
        return simulation

    sprayed = run(routing="spray", recovery="selective", reorder=0)
    hashed = run()
    spine_ports = [p for p in range(2 * len(network.links)) if network.names[network.ends(p)[1]].startswith("spine")]
    sent = sprayed.state.ports["tx_bytes"][spine_ports][:4]
    assert sent.min() > 0.9 * sent.max()
    assert sprayed.makespan() < 1.1 * 2e6 * 1.048 * 8 / 100e9
    assert hashed.makespan() > 1.8 * sprayed.makespan()
    turns = run(routing="round_robin", recovery="selective", reorder=0)
    assert turns.state.ports["tx_bytes"][spine_ports][:4].std() < 4000
    assert sprayed.state.flows["retransmits"].sum() == turns.state.flows["retransmits"].sum() == 0


def test_out_of_order_paths_need_a_receiver_that_takes_them():
    with pytest.raises(ConfigError, match=r"--transport\.recovery selective"):
        Constant(routing="spray")


@pytest.mark.parametrize("recovery", ["go_back_n", "selective", "newreno"])
def test_every_kind_of_recovery_delivers_everything_through_losses(recovery):
    network = LeafSpine(leaves=2, spines=1, hosts_per_leaf=4).network()
    flows = [Flow(i, 4 + i, 1_000_000) for i in range(4)]
    transport = Constant(window_bdp=1.5, recovery=recovery, rto_us=200.0)
    simulation = Simulation(network, flows, transport, LOSSY)
    assert simulation.run().complete
    state = simulation.state
    assert state.ports["drops"].sum() > 0
    assert (state.flows["received"] == 1_000_000).all()
    assert state.flows["retransmits"].sum() >= state.ports["drops"].sum() * (recovery != "go_back_n")


def test_go_back_n_sends_more_again_than_selective_repeat():
    network = LeafSpine(leaves=2, spines=1, hosts_per_leaf=4).network()
    flows = [Flow(i, 4 + i, 1_000_000) for i in range(4)]

    def again(recovery):
        transport = Constant(window_bdp=1.5, recovery=recovery, rto_us=200.0)
        simulation = Simulation(network, flows, transport, LOSSY)
        simulation.run()
        return simulation.state.flows["retransmits"].sum()

    assert again("go_back_n") > 2 * again("selective")


def storage(transport, dies):
    """I/Os of 16 to 64 KB from each host, the link to a spine dying under them; completion times in seconds."""
    network = leaves(host_gbps=25.0)
    rng = np.random.default_rng(3)
    flows = [
        Flow(int(rng.integers(4)), 4 + int(rng.integers(4)), int(rng.integers(4, 17)) * 4096, start=int(t))
        for t in np.sort(rng.uniform(0, 4 * MILLISECOND, 400))
    ]
    simulation = Simulation(network, flows, transport, Switches(flow_control="lossy"))
    simulation.run(MILLISECOND)
    if dies:
        simulation.fail_link(8)
    simulation.run(1500 * MILLISECOND)
    return simulation


def test_with_solar_no_io_hangs_when_a_path_dies():
    dead = storage(Solar(), True)
    times = dead.completion_times()
    assert not np.isnan(times).any()
    assert times.max() < 0.01  # a few timeouts of 1 ms, far from a second
    assert storage(Solar(), False).completion_times().max() < 1e-3
    # One path an I/O, as RoCE has it: what was hashed onto the dead link hangs.
    stuck = storage(Hpcc(payload=4096, recovery="selective"), True).completion_times()
    assert np.isnan(stuck).any()


def test_source_routes_are_followed():
    network = leaves()
    spine2 = network.names.index("spine2")
    route = network.path_through(0, [network.names.index("leaf0"), spine2, network.names.index("leaf1")], 5)
    simulation = Simulation(network, [Flow(0, 5, 100_000, route=route)], Constant())
    simulation.run()
    used = {network.port_name(p) for p in np.flatnonzero(simulation.state.ports["tx_bytes"])}
    assert {"leaf0→spine2", "spine2→leaf1"} <= used and "leaf0→spine1" not in used
    with pytest.raises(DataError, match="no link joins"):
        network.path_through(0, [spine2], 5)


def test_a_chain_of_memories_on_nics_reduces_at_line_rate():
    """NetDAM: 2^29 fp32 summed along a ring of four nodes, without a host: the bound by bandwidth."""
    from luban.netsim.topology.clos import Star
    from luban.netsim.workloads.collective import Collective

    scale = 64  # the real size takes half a minute of packets; time is proportional
    network = Star(hosts=4, delay_us=0.2).network()
    workload = Collective(algorithm="ring", bytes=4 * 2**29 // scale)
    flows = workload.flows(network, np.random.default_rng(0))
    simulation = Simulation(network, flows, Constant(payload=8192, header=42))
    simulation.run()
    assert simulation.makespan() * scale == pytest.approx(0.2577, rel=0.02)


def test_bad_flows_are_said():
    network = leaves()
    with pytest.raises(DataError, match="to itself"):
        Simulation(network, [Flow(1, 1, 10)], Constant())
    with pytest.raises(DataError, match="hosts 0 to 7"):
        Simulation(network, [Flow(1, 8, 10)], Constant())
    with pytest.raises(DataError, match="waits for flow 3"):
        Simulation(network, [Flow(1, 2, 10, after=(3,))], Constant())
    with pytest.raises(DataError, match="classes are 1 to 3"):
        Simulation(network, [Flow(1, 2, 10, cls=0)], Constant())
    waiting = Simulation(network, [Flow(1, 2, 10, after=(1,)), Flow(2, 3, 10, after=(0,))], Constant())
    assert waiting.run().reason == "nothing more can happen, and flows are unfinished"
