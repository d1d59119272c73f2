"""Inside of servers: PCIe, cards, classes; EFLOPS's three bottlenecks; scenarios compared in one table."""

import json

import numpy as np
import pytest

from luban.cli.main import main
from luban.core.errors import ConfigError
from luban.netsim.congestion.constant import Constant
from luban.netsim.congestion.hpcc import Hpcc
from luban.netsim.flows import Flow
from luban.netsim.simulation import Simulation
from luban.netsim.topology.rails import Rails
from luban.netsim.topology.servers import Servers

PACKET = (4096 + 48) / 4096  # bytes on the wire a byte of data


def test_nvlink_runs_at_its_rate_and_infinibands_credits_do_not_bound_it():
    """8 MB over 3.6 Tb/s and two links of 0.3 µs: 64 kB of credit would let 800 Gb/s pass."""
    network = Rails(servers=1, gpus=8).network()
    simulation = Simulation(network, [Flow(0, 5, 8_000_000)], Constant(payload=4096))
    assert simulation.run().complete
    assert simulation.makespan() == pytest.approx(8e6 * 8 / 3.6e12 * (4096 + 48) / 4096 + 0.6e-6, rel=0.01)


def compared(name, capsys, *words):
    assert main(["simulate", name, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_gpu_reaches_its_card_by_its_own_switch_and_main_memory_by_the_root():
    network = Servers(servers=2, gpus=4, nics=4, pcie_switches=2).network()
    assert len(network.hosts) == 2 * 4 + 2 and len(network.links) == 2 * (1 + 2 + 4 + 2 * 4)
    rng = np.random.default_rng(0)

    def names(src, dst):
        return [network.names[network.ends(port)[1]] for port in network.hashed_path(src, dst, rng)]

    out = names(1, 6)  # gpu0.1 → gpu1.2
    assert out[0] == "pcie0.0" and out[1] in ("nic0.0", "nic0.1") and out[2] == "leaf0"
    assert out[3] in ("nic1.2", "nic1.3") and out[4:] == ["pcie1.1", "gpu1.2"]
    assert names(8, 2) == ["root0", "pcie0.1", "gpu0.2"] and names(0, 1) == ["pcie0.0", "gpu0.1"]
    at_root = Servers(servers=2, gpus=4, nics=1, pcie_switches=2, nic_at="root").network()
    path = [at_root.names[at_root.ends(port)[1]] for port in at_root.hashed_path(0, 4, rng)]
    assert path == ["pcie0.0", "root0", "nic0.0", "leaf0", "nic1.0", "root1", "pcie1.0", "gpu1.0"]


def test_what_servers_refuse():
    with pytest.raises(ConfigError, match="6 GPUs can't be dealt to 4 PCIe switches"):
        Servers(gpus=6, pcie_switches=4).network()
    with pytest.raises(ConfigError, match="nic_memory_gbps"):
        Servers(nic_memory_gbps=-1.0).network()


def test_pcie_hands_out_credits_and_neither_marks_nor_reports():
    network = Servers(servers=2, gpus=2, nics=2, pcie_switches=1, pcie_gbps=64.0).network()
    flows = [Flow(0, 2, 3_000_000), Flow(1, 3, 3_000_000), Flow(4, 0, 3_000_000)]
    simulation = Simulation(network, flows, Hpcc())
    assert simulation.run().complete
    state = simulation.state
    inside = np.isin(state.ports["node"], list(network.inside))
    assert state.ports["drops"].sum() == 0 and state.ports["marks"][inside].sum() == 0
    into = np.isin(state.ports["peer"], list(network.inside))
    assert (state.queues["credits"].reshape(-1, 4)[into, 1] <= 64_000).all()
    # Between the two PCIe switches a packet passes two cards and the leaf; the leaf alone has written into it.
    assert state.lanes["seen"][0][0].any() and not state.lanes["seen"][0][1:].any()


def test_sharing_a_card_costs_its_share_of_the_bandwidth(capsys):
    """Eight GPUs over one card of 100 Gb/s, a card for each of them: eight times the bytes over a link."""
    rows = compared(
        "eflops_nic", capsys, "--workload.bytes", "4000000", "--topology.servers", "2", "--workload.ranks", "16"
    )
    ends = {name: row["ends"] for name, row in rows.items()}
    assert ends["one card a server"] / ends["a card for each GPU"] == pytest.approx(8, rel=0.15)
    assert ends["two cards"] / ends["a card for each GPU"] == pytest.approx(4, rel=0.15)
    steps, piece = 2 * 15, 4_000_000 / 16
    assert ends["a card for each GPU"] == pytest.approx(steps * piece * PACKET * 8 / 100e9, rel=0.25)  # and latency


def test_cards_behind_the_root_complex_cost_what_its_links_lack(capsys):
    """Four GPUs of 100 Gb/s each over one PCIe link of 128: 3.125 times as long."""
    words = ("--workload.bytes", "4000000", "--topology.servers", "2", "--workload.ranks", "16")
    rows = compared("eflops_pcie", capsys, *words)
    ends = [row["ends"] for row in rows.values()]
    assert ends[0] / ends[2] == pytest.approx(4 * 100 / 128, rel=0.15)
    assert ends[1] / ends[2] == pytest.approx(2 * 100 / 128, rel=0.15)


def test_classes_give_an_even_service_beside_data_that_is_loaded(capsys):
    """A GPU's PCIe link of 128 Gb/s carries an all-reduce of up to 100 and as much data as comes. Deficit round robin gives 8/9 of it
    to the all-reduce, which needs less."""
    rows = compared("eflops_qos", capsys, "--workload.job.bytes", "8000000")
    alone, mixed, even, most = (rows[name] for name in (*list(rows)[:3], list(rows)[-1]))
    assert mixed["ends"] > 1.4 * alone["ends"] and mixed["deviation"] > 0.3 * mixed["mean"]
    assert even["ends"] > 1.4 * alone["ends"]  # a half of 128 isn't enough
    assert most["ends"] < 1.02 * alone["ends"] and most["deviation"] < 0.02 * most["mean"]


def test_one_job_over_infiniband_and_over_roce_in_one_table(capsys):
    """With random paths some link carries several flows of a ring's step; adaptive routing spreads them over all spines."""
    rows = compared("infiniband_and_roce", capsys, "--workload.bytes", "4000000")
    assert all(row["drops"] == 0 for row in rows.values())
    fixed, adaptive = rows["InfiniBand: one path a flow"], rows["InfiniBand: adaptive routing"]
    ideal = 2 * 31 * (4_000_000 / 32) * PACKET * 8 / 100e9
    assert ideal < adaptive["ends"] < 1.6 * ideal < 0.8 * fixed["ends"]
    assert rows["RoCE: PFC alone"]["ends"] > 1.4 * adaptive["ends"]
    assert fixed["pauses"] == 0


SCENARIO = """
[topology]
type = "star"
hosts = 5
[workload]
type = "incast"
senders = 4
bytes = 50000
[compare.two]
workload.senders = 2
[compare."all four, lossy"]
switch.flow_control = "lossy"
"""


def test_variants_are_written_and_printed(tmp_path, capsys):
    path, out = tmp_path / "s.toml", tmp_path / "out"
    path.write_text(SCENARIO)
    assert main(["simulate", str(path), "--out", str(out), "--run.sample_us", "0"]) == 0
    printed = capsys.readouterr().out
    assert "longest queue" in printed and "all four, lossy" in printed
    rows = json.loads((out / "comparison.json").read_text())
    assert rows["two"]["ends"] < rows["all four, lossy"]["ends"]
    one = json.loads((out / "two" / "summary.json").read_text())
    assert one["flows"] == 2 and one["completion_seconds"] == rows["two"]["ends"]
    assert (out / "all-four-lossy" / "report.html").exists()
    assert main(["simulate", str(out / "two" / "scenario.toml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["completion_seconds"] == one["completion_seconds"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("compare = 3", "tables"), ("[compare]\nx = 1", "tables"), ("[compare.a]\nnonsense = 1\n[compare.b]", "nonsense")],
)
def test_a_comparison_that_is_none_is_said(text, said, tmp_path, capsys):
    path = tmp_path / "s.toml"
    path.write_text(
        text + "\n" + SCENARIO.split("[compare.two]")[0]
        if "[" not in text
        else SCENARIO.split("[compare.two]")[0] + text
    )
    assert main(["simulate", str(path)]) in (1, 2)
    assert said in capsys.readouterr().err


def test_a_job_and_what_goes_on_beside_it_keep_their_dependencies(capsys):
    from luban.netsim.workloads.collective import Collective
    from luban.netsim.workloads.mixed import Mixed

    network = Servers(servers=2, gpus=2, nics=2, pcie_switches=2).network()
    ring = Collective(algorithm="ring", bytes=400_000, ranks=4)
    flows = Mixed(job=ring, beside=ring, beside_class=2).flows(network, np.random.default_rng(0))
    half = len(flows) // 2
    assert [tuple(n + half for n in f.after) for f in flows[:half]] == [f.after for f in flows[half:]]
    assert {f.cls for f in flows[:half]} == {1} and {f.cls for f in flows[half:]} == {2}
    assert Simulation(network, flows, Constant()).run().complete
    with pytest.raises(ConfigError, match=r"workload\.beside_class must be from 1 to 3"):
        Mixed(job=ring, beside=ring, beside_class=4).flows(network, np.random.default_rng(0))
