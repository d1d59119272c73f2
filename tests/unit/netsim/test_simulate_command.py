"""`luban simulate` through the real command line."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from luban.cli.main import main
from luban.cli.simulate import USAGE
from luban.core.config import from_dict, load_toml
from luban.netsim import SHIPPED
from luban.netsim.comparison import variants
from luban.netsim.engine import loop
from luban.netsim.scenario import Scenario
from luban.netsim.topology.x_man import XMan
from luban.report.network import slowdown_chart, topology_picture

SMALL = """
title = "two hosts"
[topology]
type = "star"
hosts = 3
[workload]
type = "incast"
senders = 2
bytes = 100000
"""


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def test_a_scenario_becomes_a_folder_of_results(scenario, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["simulate", str(scenario), "--out", str(out), "--transport.type", "dctcp", "--run.seed", "3"]) == 0
    assert "completion" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {
        "summary.json",
        "scenario.toml",
        "flows.jsonl",
        "ports.jsonl",
        "queues.jsonl",
        "report.html",
    }
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"] and summary["flows_finished"] == 2 and summary["bytes_received"] == 200_000
    flows = [json.loads(line) for line in (out / "flows.jsonl").read_text().splitlines()]
    assert [f["bytes"] for f in flows] == [100_000, 100_000] and all(f["slowdown"] >= 0.999 for f in flows)
    page = (out / "report.html").read_text()
    assert page.count("<svg") >= 4 and "switch→host0" in page
    # The scenario that is written beside the results gives the same results.
    assert main(["simulate", str(out / "scenario.toml"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["completion_seconds"] == summary["completion_seconds"] and again["events"] == summary["events"]
    assert main(["simulate", str(scenario), "--out", str(out)]) == 1  # never over what is there


CIRCLE = """
[topology]
type = "graph"
links = ["host0 s0 100 1", "host1 s1 100 1", "host2 s2 100 1", "s0 s1 100 1", "s1 s2 100 1", "s2 s0 100 1"]
[workload]
type = "flows"
flows_list = ["0 2 3e6 via s0 s1 s2", "1 0 3e6 via s1 s2 s0", "2 1 3e6 via s2 s0 s1"]
[transport]
type = "constant"
[switch]
buffer_bytes = 400000
"""


def test_a_deadlock_leaves_what_there_is_and_is_named(tmp_path, capsys):
    path, out = tmp_path / "circle.toml", tmp_path / "out"
    path.write_text(CIRCLE)
    assert main(["simulate", str(path), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "0 of 3 finished" in printed.out and "luban: PFC deadlock at " in printed.err
    found = json.loads((out / "summary.json").read_text())
    assert set(found["deadlock"]) == {"s0→s1", "s1→s2", "s2→s0"} and not found["complete"] and found["pauses"] > 0
    assert len((out / "flows.jsonl").read_text().splitlines()) == 3 and (out / "queues.jsonl").read_text()
    page = (out / "report.html").read_text()
    assert "PFC deadlock at" in page and page.count("<svg") >= 4


def test_use_and_queues_are_of_the_whole_run_and_of_its_second_half(scenario, capsys):
    """A flow of 1 MB from the middle of the run on: half of the time the link is idle, then full."""
    words = ["--run.until_us", "160", "--run.sample_us", "0.1"]
    late = scenario.read_text().replace('type = "incast"', 'type = "flows"').replace("senders = 2\nbytes = 100000", "")
    scenario.write_text(late + 'flows_list = ["1 0 1e9 80"]\n[transport]\ntype = "constant"\n')
    assert main(["simulate", str(scenario), "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["use"]["switch→host0"] == pytest.approx(0.5, abs=0.03)
    assert found["second_half"]["use"]["switch→host0"] == pytest.approx(1.0, abs=0.05)
    assert found["second_half"]["from_seconds"] == pytest.approx(80e-6, abs=1e-6)


def test_a_step_with_dependencies_runs_in_fluid_mode_as_in_packets(tmp_path, capsys):
    words = ["simulate", "training_step", "--json", "--workload.layers", "4"]
    assert main([*words, "--mode", "fluid", "--out", str(tmp_path / "out")]) == 0
    fluid = json.loads(capsys.readouterr().out)
    assert main(words) == 0
    packets = json.loads(capsys.readouterr().out)
    assert fluid["flows"] == packets["flows"] == fluid["flows_finished"]
    assert fluid["completion_seconds"] == pytest.approx(packets["completion_seconds"], rel=0.1)
    assert set(fluid["by_label"]) == set(packets["by_label"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "flows.jsonl").read_text().splitlines()]
    assert len(rows) == fluid["flows"] and all(row["seconds"] > 0 and row["start_seconds"] >= 0 for row in rows)


def test_fluid_mode_and_packets_answer_the_same_question(scenario, capsys):
    assert main(["simulate", str(scenario), "--json", "--workload.bytes", "10000000", "--mode", "fluid"]) == 0
    fluid = json.loads(capsys.readouterr().out)
    assert fluid["completion_seconds"] == pytest.approx(2 * 10e6 * 8 / 100e9 + 2e-6, rel=1e-9)
    assert (
        main(["simulate", str(scenario), "--json", "--workload.bytes", "10000000", "--transport.type", "constant"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["completion_seconds"] == pytest.approx(
        fluid["completion_seconds"], rel=0.06
    )


def test_every_shipped_scenario_is_read_and_listed(capsys):
    assert main(["simulate", "--list"]) == 0
    listed = capsys.readouterr().out
    names = [path.stem for path in SHIPPED.glob("*.toml")]
    assert {"incast", "ring_allreduce", "hpcc_320", "x_man", "hcc"} <= set(names)
    for name in names:
        for data in variants(load_toml(SHIPPED / f"{name}.toml", SHIPPED)).values():
            scenario = from_dict(Scenario, data)
            assert scenario.title and f"{name} " in listed and scenario.title in listed
            assert scenario.topology.network().hosts


@pytest.mark.parametrize(
    "name", ["x_man", "hcc", "training_step", "infiniband", "ufab_tenants", "bigraph_halving_doubling"]
)
def test_shipped_scenarios_run_in_small(name, capsys):
    until = "800" if name == "training_step" else "40"  # it computes first
    words = ["simulate", name, "--json", "--run.until_us", until]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packets_delivered"] > 0 and found["drops"] == 0


def test_the_examples_of_the_help_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    examples = [line.split("#")[0].split() for line in USAGE.splitlines() if line.startswith("  luban simulate incast")]
    assert len(examples) == 3
    for words in examples:
        assert main([*words[1:], "--workload.bytes", "20000"]) == 0
    printed = capsys.readouterr().out
    assert "16 of 16 finished" in printed and '"flows_finished": 40' in printed


def test_the_defaults_of_star_and_incast_go_together(tmp_path, capsys):
    path = tmp_path / "least.toml"
    path.write_text('topology = { type = "star" }\nworkload = { type = "incast", bytes = 1000 }\n')
    assert main(["simulate", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["flows_finished"] == 15


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "luban simulate takes one scenario"),
        (["nowhere"], "no scenario 'nowhere'"),
        (["incsat"], "no scenario 'incsat': neither a file nor one that ships (did you mean 'incast'?)"),
        (["FILE", "--run.fail_at_us", "5"], "run.fail_at_us 5 without links: name them with run.fail_links"),
        (["FILE", "--run.repair_at_us", "5"], "run.repair_at_us 5 without links"),
        (["FILE", "--workload.bytes", "1000000000000000000"], "at most 1073741824"),
        (["FILE", "--transport.eta", "0"], "transport.eta must be above 0 and at most 1, 0.0 given"),
        (["FILE", "--transport.eta", "-1"], "transport.eta must be above 0"),
        (["FILE", "--transport.eta", "nan"], "transport.eta must be above 0"),
        (["FILE", "--transport.type", "pint", "--transport.eta", "2"], "transport.eta must be above 0"),
        (["FILE", "--transport.type", "ufab", "--transport.eta", "0"], "transport.eta must be above 0"),
        (["FILE", "--transport.type", "hpc"], "did you mean 'hpcc'"),
        (["FILE", "--topolgy.hosts", "4"], "did you mean 'topology'"),
        (["FILE", "--workload.senders", "3"], "from 1 to 2"),
        (["FILE", "--workload.receiver", "7"], "hosts 0 to 2"),
        (["FILE", "--switch.buffer_bytes", "10"], "switch.buffer_bytes 10 holds no packet: one has 1090 bytes"),
        (["FILE", "--switch.port_bytes", "10"], "switch.port_bytes 10 holds no packet"),
        (["FILE", "--topology.host_gbps", "0"], "topology.host_gbps must be at least 0.001 Gb/s, 0 given"),
        (["FILE", "--topology.delay_us", "-1"], "topology.delay_us must not be below 0 µs, -1 given"),
        (
            ["FILE", "--run.watch", "host0→host1"],
            "run.watch: 'host0→host1': no link joins host0 and host1; host0 is joined to switch",
        ),
        (["FILE", "--run.watch_flows", "9"], "run.watch_flows: there is no flow 9, only 0 to 1"),
        (["FILE", "extra"], "2 given: extra is one word too many"),
        (["torus_allreduce", "--workload.shape", "2,2,2"], "workload.shape 2,2,2 must multiply to the 64 ranks"),
        (["torus_allreduce", "--workload.at_once", "2"], "workload.at_once must be 1, 3 or 6"),
        (["FILE", "--switch.headroom_bytes", "10"], "are needed"),
        (["FILE", "--run.watch", "switch→host9"], "run.watch"),
        (["FILE", "--run.until_us", "-1"], "must not be below 0"),
        (["FILE", "--topology.failed_links", "0"], "isn't connected"),
        (["FILE", "--run.seed"], "needs a value"),
        (["FILE", "--mode", "fluid", "--run.until_us", "5"], "mode fluid runs every flow to its end"),
    ],
)
def test_bad_input_is_one_line(words, said, scenario, capsys):
    words = [str(scenario) if word == "FILE" else word for word in words]
    code = main(["simulate", "--json", *words])
    printed = capsys.readouterr()
    assert code == 2 and said in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("flow", "said"),
    [
        ("0 1 inf", "BYTES must be a whole number from 0 to 1e+15, inf given"),
        ("0 1 nan", "BYTES must be a whole number from 0 to 1e+15, nan given"),
        ("0 1 1e18", "BYTES must be a whole number from 0 to 1e+15, 1e+18 given"),
        ("0 1 1.5", "BYTES must be a whole number from 0 to 1e+15, 1.5 given"),
        ("0 1 -1", "BYTES must be"),
        ("inf 1 10", "names host inf; there are hosts 0 to 2"),
        ("0 nan 10", "names host nan"),
        ("0 1 10 inf", "START_US must be a number from 0 to 1e+12, inf given"),
        ("0 1 10 nan", "START_US must be"),
        ("0 1 10 0 1.5", "CLASS must be one of 1 to 3, 1.5 given"),
        ("0 1 10 0 4", "CLASS must be one of 1 to 3, 4 given"),
        ("0 1 10 0 1 0", "WEIGHT must be a number above 0, at most 1e+06, 0 given"),
        ("0 1 10 0 1 nan", "WEIGHT must be"),
        ("0 1 1e15", "at most 1073741824"),
        ("1 1 10", "'1 1 10' sends from host 1 to itself: FROM and TO must differ"),
        ("0 1 10 via spine", "goes over spine, which the topology doesn't have"),
    ],
)
def test_a_flow_that_cannot_be_is_refused_by_its_field(flow, said, tmp_path, capsys):
    path = tmp_path / "flows.toml"
    path.write_text(f'[topology]\ntype = "star"\nhosts = 3\n[workload]\ntype = "flows"\nflows_list = ["{flow}"]\n')
    assert main(["simulate", "--json", str(path)]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_help_shows_every_field_with_a_comment(capsys):
    assert main(["simulate", "--help"]) == 0
    text = capsys.readouterr().out
    for field in ("--topology.type", "--transport.type", "--switch.buffer_bytes", "--run.until_us", "--workload.type"):
        assert field in text


def test_help_of_a_scenario_has_the_fields_of_its_parts(capsys):
    assert main(["simulate", "training_step", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--workload.layer_bytes" in shown and "--topology.gpus" in shown and "training_step has them" in shown


CUT_OFF = ["--run.fail_links", "1", "--run.fail_at_us", "2"]


def test_a_run_that_is_not_complete_has_no_completion(scenario, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["simulate", str(scenario), "--out", str(out), *CUT_OFF]) == 1
    assert "completion            not complete (1 of 2 flows)" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["completion_seconds"] is None and not summary["complete"]
    # Goodput and use are over what was simulated, so that every port's share is one.
    received = summary["bytes_received"]
    assert summary["goodput_gbps"] == pytest.approx(received * 8 / summary["simulated_seconds"] / 1e9)
    ports = [json.loads(line) for line in (out / "ports.jsonl").read_text().splitlines()]
    assert ports and all(0 < port["use"] <= 1 for port in ports)
    # A run whose time is over before any flow has finished.
    assert main(["simulate", str(scenario), "--run.until_us", "3"]) == 0
    assert "not complete (0 of 2 flows)" in capsys.readouterr().out


def test_a_cut_off_row_of_a_comparison_says_so(scenario, tmp_path, capsys):
    scenario.write_text(
        scenario.read_text()
        + '[compare.whole]\nrun.seed = 1\n[compare."a link fails"]\nrun.fail_links = [1]\nrun.fail_at_us = 2.0\n'
    )
    assert main(["simulate", str(scenario), "--out", str(tmp_path / "out")]) == 1
    lines = {line.split("  ")[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert "not complete (1 of 2 flows): no working path" in lines["a link fails"]
    assert "not complete" not in lines["whole"]
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert rows["whole"]["complete"] and rows["whole"]["ends"] > 0
    assert rows["a link fails"]["ends"] is None and not rows["a link fails"]["complete"]


def test_a_comparison_that_is_interrupted_names_what_was_not_run(scenario, monkeypatch, capsys):
    scenario.write_text(scenario.read_text() + "[compare.one]\nrun.seed = 1\n[compare.two]\nrun.seed = 2\n")
    calls = []

    def interrupted(world, until, most):
        calls.append(most)
        if most:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(loop, "advance", interrupted)
    monkeypatch.setattr("luban.netsim.simulation.is_cached", lambda function: True)
    assert main(["simulate", str(scenario)]) == 130
    out = capsys.readouterr().out
    assert "not complete (0 of 2 flows): interrupted" in out and "not run" in out and len(calls) == 2


def test_fluid_mode_writes_its_page_and_ports(scenario, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["simulate", str(scenario), "--mode", "fluid", "--out", str(out)]) == 0
    assert f"{out}/report.html" in capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert names == {"summary.json", "scenario.toml", "flows.jsonl", "ports.jsonl", "report.html"}
    ports = {row["port"]: row for row in map(json.loads, (out / "ports.jsonl").read_text().splitlines())}
    assert {name: row["bytes"] for name, row in ports.items()} == {
        "switch→host0": 200_000,
        "host1→switch": 100_000,
        "host2→switch": 100_000,
    }
    assert ports["host2→switch"]["link"] == 2 and ports["switch→host0"]["use"] == pytest.approx(16 / 18, rel=1e-6)
    page = (out / "report.html").read_text()
    assert "Topology" in page and "Flow completion times" in page and "Queues" not in page


def test_links_within_a_row_are_arcs_and_few_sizes_a_table():
    """Of X-MAN's mesh no two links are drawn over each other; two sizes have no curve between them."""
    network = XMan(servers=1).network()
    picture = topology_picture(network, np.zeros(2 * len(network.links)), 0.0)
    paths = re.findall(r'd="(M[^"]+)"', picture)
    assert len(paths) == len(set(paths)) == len(network.links)
    assert sum("Q" in path for path in paths) == 16  # two halves of six links and four between twins
    flows = [{"bytes": size, "slowdown": 1.0 + i / 100} for i in range(150) for size in (1000, 2000)]
    table = slowdown_chart(flows)
    assert "<svg" not in table and "<td>1 kB</td><td>150</td><td>1.75</td>" in table
    assert "<svg" in slowdown_chart([{**row, "bytes": row["bytes"] + i} for i, row in enumerate(flows)])


def test_the_example_of_a_file_in_the_documentation_runs(tmp_path, capsys):
    """Hosts, links and flows are as the page says: link 2 joins s0 and s1, and its ports carry the flows between them."""
    page = (Path(__file__).parents[3] / "docs" / "NETWORK.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.+?)```", page, re.DOTALL)
    path, out = tmp_path / "example.toml", tmp_path / "out"
    path.write_text(example)
    assert main(["simulate", str(path), "--out", str(out), "--run.watch_flows", "0,1"]) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 finished" in printed
    ports = {row["port"]: row for row in map(json.loads, (out / "ports.jsonl").read_text().splitlines())}
    assert ports["s0→s1"]["link"] == 2 and ports["s0→s1"]["gbps"] == 50
    samples = [json.loads(line)["received_bytes"] for line in (out / "queues.jsonl").read_text().splitlines()]
    assert max(row["0"] for row in samples) <= 1_000_000 and samples[-1]["1"] > 0
    assert all(before["0"] <= after["0"] for before, after in itertools.pairwise(samples))


def test_the_help_says_how_texts_are_written(capsys):
    assert main(["simulate", "ruta_segments", "--help"]) == 0
    said = capsys.readouterr().out
    assert (
        '"FROM TO BYTES [START_US [CLASS [WEIGHT]]] [via SWITCH …]"' in said
        and '"NODE NODE GBPS [MICROSECONDS]"' in said
    )
    assert said.count("as in ports.jsonl") == 1 and "names that begin with host or gpu are hosts" in said


def test_too_many_packets_in_flight_leave_what_there_is(scenario, monkeypatch, capsys):
    monkeypatch.setattr("luban.netsim.simulation.MOST_PACKETS", 4096)
    words = ["--transport.type", "constant", "--workload.bytes", "8000000"]
    assert main(["simulate", str(scenario), "--json", *words]) == 1
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert "more than 4096 packets in flight" in printed.err and found["reason"] in printed.err
    assert found["packets_delivered"] > 0 and found["completion_seconds"] is None


def test_a_type_that_replaces_another_says_what_it_leaves_out(capsys):
    assert main(["simulate", "incast", "--json", "--topology.type", "fat_tree", "--workload.bytes", "1000"]) == 0
    said = capsys.readouterr().err
    assert "topology.type fat_tree leaves out hosts, which it doesn't have" in said
