"""Paths and losses: spraying, per-path control, a path that dies, selective repeat, go-back-N."""

import numpy as np
import pytest
from netsim_networks import MILLISECOND, path_through

from luban.core.errors import ConfigError
from luban.netsim.congestion.constant import Constant
from luban.netsim.congestion.hpcc import Hpcc
from luban.netsim.congestion.solar import Solar
from luban.netsim.flows import Flow
from luban.netsim.simulation import Simulation
from luban.netsim.switches import Switches
from luban.netsim.topology.clos import LeafSpine, Star

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


def test_a_sprayed_permutation_loads_links_evenly_and_ends_before_a_hashed_one():
    """Every host of a leaf sends to another leaf: as many flows a leaf as it has spines. Sprayed, every link between switches
    carries its share and the permutation ends about when a flow alone does; hashed, some links carry several flows and the
    last ends that much later."""
    network = LeafSpine(leaves=4, spines=8, hosts_per_leaf=8).network()
    between = [p for p in range(2 * len(network.links)) if all(network.is_fabric(node) for node in network.ends(p))]
    alone, ratios = 1e6 * 1.048 * 8 / 100e9, []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        flows = [
            Flow(8 * leaf + i, 8 * ((leaf + 1) % 4) + int(j), 10**6)
            for leaf in range(4)
            for i, j in enumerate(draw.permutation(8))
        ]
        took, loads = {}, {}
        for routing in ("spray", "ecmp"):
            transport = Constant(routing=routing, recovery="selective", reorder=0)
            simulation = Simulation(network, flows, transport, seed=seed)
            assert simulation.run().complete
            took[routing], loads[routing] = simulation.makespan(), simulation.state.ports["tx_bytes"][between]
        busy = loads["spray"][loads["spray"] > 10**5]  # the others carry acknowledgements
        assert len(busy) == len(between) and busy.max() < 1.15 * busy.mean() and busy.min() > 0.85 * busy.mean()
        most = loads["ecmp"].max() / busy.mean()  # flows on the fullest link
        assert most > 1.8 and took["ecmp"] == pytest.approx(most * alone, rel=0.15)
        assert took["spray"] < 1.25 * alone
        ratios.append(took["ecmp"] / took["spray"])
    assert np.mean(ratios) > 2


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
    route = path_through(network, 0, [network.names.index("leaf0"), spine2, network.names.index("leaf1")], 5)
    simulation = Simulation(network, [Flow(0, 5, 100_000, route=route)], Constant())
    simulation.run()
    used = {network.port_name(p) for p in np.flatnonzero(simulation.state.ports["tx_bytes"])}
    assert {"leaf0→spine2", "spine2→leaf1"} <= used and "leaf0→spine1" not in used
    with pytest.raises(ConfigError, match="no link joins"):
        path_through(network, 0, [spine2], 5)


def test_a_chain_of_memories_on_nics_reduces_at_line_rate():
    """NetDAM: 2^29 fp32 summed along a ring of four nodes, without a host: the bound by bandwidth."""
    from luban.netsim.workloads.collective import Collective

    network = Star(hosts=4, delay_us=0.2).network()
    flows = Collective(algorithm="ring", bytes=4 * 2**29).flows(network, np.random.default_rng(0))
    simulation = Simulation(network, flows, Constant(payload=8192, header=42))
    simulation.run()
    assert simulation.makespan() == pytest.approx(0.2577, rel=0.02)


def test_bad_flows_are_said():
    network = leaves()
    with pytest.raises(ConfigError, match="to itself"):
        Simulation(network, [Flow(1, 1, 10)], Constant())
    with pytest.raises(ConfigError, match="hosts 0 to 7"):
        Simulation(network, [Flow(1, 8, 10)], Constant())
    with pytest.raises(ConfigError, match="waits for flow 3"):
        Simulation(network, [Flow(1, 2, 10, after=(3,))], Constant())
    with pytest.raises(ConfigError, match="classes are 1 to 3"):
        Simulation(network, [Flow(1, 2, 10, cls=0)], Constant())
    waiting = Simulation(network, [Flow(1, 2, 10, after=(1,)), Flow(2, 3, 10, after=(0,))], Constant())
    assert waiting.run().reason == "nothing more can happen, and flows are unfinished"


def test_an_ejected_path_comes_back_after_a_repair():
    """A long flow over four spines: the one that dies carries nothing until it is tried again after its repair."""
    network = leaves()
    simulation = Simulation(network, [Flow(0, 4, 200_000_000)], Solar(probe_us=2000.0), Switches(flow_control="lossy"))
    up = [p for p in range(2 * len(network.links)) if network.port_name(p).startswith("leaf0→spine")]

    def sent_until(time):
        before = simulation.state.ports["tx_bytes"][up].copy()
        simulation.run(time)
        return simulation.state.ports["tx_bytes"][up] - before

    assert sent_until(MILLISECOND).min() > 2_000_000
    simulation.fail_link(up[0] >> 1)
    dead = sent_until(6 * MILLISECOND)  # two timeouts of 1 ms, the first of them with its alarm's delay
    assert dead[0] < 100_000 < 15_000_000 < dead[1:].min()  # the others go on meanwhile
    assert simulation.state.lanes["ejected"].tolist() == [1, 0, 0, 0]
    simulation.repair_link(up[0] >> 1)
    sent_until(12 * MILLISECOND)  # tried again each 2 ms
    assert simulation.state.lanes["ejected"].sum() == 0
    assert sent_until(13 * MILLISECOND).min() > 2_000_000
    assert simulation.run().complete
    assert simulation.state.flows["retransmits"][0] < 100
    never = Simulation(network, [Flow(0, 4, 100_000_000)], Solar(probe_us=0.0), Switches(flow_control="lossy"))
    never.run(MILLISECOND)
    never.fail_link(up[0] >> 1)
    never.run(6 * MILLISECOND)
    never.repair_link(up[0] >> 1)
    assert never.run().complete and never.state.lanes["ejected"].sum() == 1


def test_adaptive_routing_leaves_the_port_that_others_fill():
    """Of two spines one is filled by a flow that is bound to it: adaptive packets take the other, sprayed ones both."""
    network = LeafSpine(leaves=2, spines=2, hosts_per_leaf=4).network()
    node = {name: i for i, name in enumerate(network.names)}
    bound = path_through(network, 0, [node["leaf0"], node["spine0"], node["leaf1"]], 4)

    def share(routing):
        transport = Constant(routing=routing, recovery="selective", reorder=0, window_bdp=3.0)
        flows = [Flow(0, 4, 4_000_000, route=bound), Flow(1, 5, 2_000_000)]
        simulation = Simulation(network, flows, transport, Switches(flow_control="credits"))
        assert simulation.run().complete
        assert simulation.state.flows["received"].tolist() == [4_000_000, 2_000_000]
        up = [network.port_between(node["leaf0"], node[f"spine{i}"]) for i in range(2)]
        sent = simulation.state.ports["tx_bytes"][up] / 1.048
        return (sent[0] - 4_000_000) / 2_000_000, simulation.completion_times()[1]

    assert share("adaptive")[0] < 0.1 < 0.4 < share("spray")[0] < 0.6
    assert share("adaptive")[1] < 1.1 * 2e6 * 1.048 * 8 / 100e9


def test_segments_are_passed_one_by_one_and_their_bytes_taken_off():
    """Eight bytes of header and eight for each segment that is still to come, on every link of the way."""
    from luban.netsim.topology.torus import Torus

    network = Torus(x=4, y=4, z=1).network()
    node = {name: i for i, name in enumerate(network.names)}
    via = ("switch0,1,0", "switch2,1,0")
    flow = Flow(0, 8, 1_000_000, segments=tuple(node[name] for name in via))  # to host 2,0,0
    simulation = Simulation(network, [flow], Constant())
    assert simulation.run().complete
    sent = {network.port_name(int(p)): int(b) for p, b in enumerate(simulation.state.ports["tx_bytes"]) if b > 10**6}
    path = [network.port_name(p) for p in simulation.state.path_ports]
    assert set(sent) == set(path) and len(path) == 1 + 1 + 2 + 1 + 1
    left = [
        3,
        3,
        2,
        2,
        1,
        1,
    ]  # of two and the destination, by link: taken off as a packet leaves the node that it names
    assert [(sent[name] - 1_048_000) // 1000 for name in path] == [8 + 8 * n for n in left]
    # with room for one packet a link at a time nothing is lost or left over
    tight = Simulation(network, [flow], Constant(), Switches(flow_control="credits", credit_bytes=2500))
    assert tight.run().complete
    # 1000 packets whose size changes on the way: had credit leaked by a segment's bytes each, none would be left
    owed = tight.state.queues["owed"].reshape(-1, 4)[:, 1]
    assert (tight.state.queues["credits"].reshape(-1, 4)[:, 1] + owed)[: 2 * len(network.links)].min() >= 0
    switch_ports = np.array(network.switches)[tight.state.ports["peer"]]
    assert (tight.state.queues["credits"].reshape(-1, 4)[switch_ports, 1] + owed[switch_ports]).max() <= 2500


def test_bad_segments_are_said():
    network = leaves()
    with pytest.raises(ConfigError, match=r"segment \d+ is no switch"):
        Simulation(network, [Flow(0, 4, 10, segments=(network.hosts[3],))], Constant())
    with pytest.raises(ConfigError, match="the same segment twice"):
        Simulation(network, [Flow(0, 4, 10, segments=(network.names.index("spine0"),) * 2)], Constant())


def test_delayed_acknowledgements_halve_their_number_and_lose_none():
    network = LeafSpine(leaves=2, spines=1, hosts_per_leaf=1).network()
    for packets, acks in ((1000, 500), (1001, 501), (1, 1)):
        transport = Constant(ack_every=2, ack_delay_us=500.0)
        simulation = Simulation(network, [Flow(0, 1, 1000 * packets)], transport, sample_every=0)
        assert simulation.run().complete
        simulation.run()
        back = network.port_between(network.hosts[1], network.names.index("leaf1"))
        assert simulation.state.ports["tx_bytes"][back] <= acks * 64
        assert simulation.state.ports["tx_bytes"][back] >= (acks - 8) * 64  # the last may still be on the way
    # A window of one packet: every acknowledgement waits for its time.
    slow = Simulation(network, [Flow(0, 1, 10_000)], Constant(ack_every=2, ack_delay_us=500.0, window_bdp=1e-3))
    slow.run()
    assert slow.makespan() == pytest.approx(9 * 500e-6, rel=0.05)
    with pytest.raises(ConfigError, match="ack_every 2"):
        Constant(ack_every=2, recovery="selective")


def test_a_code_without_congestion_control_is_no_other_one():
    class Unknown(Constant):
        code = 99

    with pytest.raises(ValueError, match="no congestion control has this code"):
        Simulation(Star(hosts=2).network(), [Flow(0, 1, 1000)], Unknown()).run()
