"""`luban plan`: from a recipe and a cluster to a file that luban pretrain runs."""

from __future__ import annotations

import json
import tomllib
import xml.etree.ElementTree as ET

import pytest

from luban.cli.main import main
from luban.cli.plan import state_by_zero
from luban.core.arguments import parse_recipe
from luban.core.errors import UsageError
from luban.train.recipe import Recipe

CLUSTER = """
gpu = "h100-sxm"
nodes = 1
gpus_per_node = 2
price = 2.5
"""
MODEL = ["--model.width", "64", "--model.layers", "4", "--train.batch_size", "8", "--train.seq_len", "128"]


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return path


def test_a_plan_is_found_written_drawn_and_read_by_pretrain(cluster, tmp_path, capsys):
    out, picture = tmp_path / "plan.toml", tmp_path / "plan.svg"
    words = ["plan", "tiny_pretrain_cpu", "--cluster", str(cluster), *MODEL, "--top", "4"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["plans"]) == 4
    times = [plan["step_seconds"] for plan in found["plans"]]
    assert times == sorted(times)
    for plan in found["plans"]:
        low, high = plan["step_seconds_interval"]
        assert low < plan["step_seconds"] < high
        assert plan["price"] == pytest.approx(2.5 * plan["gpu_hours"])
        assert plan["energy_mwh"] == pytest.approx(plan["gpu_hours"] * 700 * 1.1 / 1e6)
    assert main([*words, "--out", str(out), "--picture", str(picture)]) == 0
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")
    chosen = found["plans"][found["chosen"]]
    assert tomllib.loads(out.read_text())["plan"] == chosen["plan"]
    call = parse_recipe(
        Recipe,
        ["tiny_pretrain_cpu", "--plan", str(out), "--dry-run", "--plan.remat", "full"],
        verb="pretrain",
        about="",
        examples="",
        shipped=_recipes(),
    )
    assert call.recipe.plan.processes == 2 and call.recipe.plan.remat == "full"  # the command line goes first
    assert call.recipe.train.accumulate == chosen["train"]["accumulate"]


def _recipes():
    from luban.cli.training import RECIPES

    return RECIPES


@pytest.mark.parametrize("text", [None, "nodes = 1\n"])
def test_a_plan_file_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "plan.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match="luban plan --out wrote"):
        parse_recipe(
            Recipe,
            ["tiny_pretrain_cpu", "--plan", str(path), "--dry-run"],
            verb="pretrain",
            about="",
            examples="",
            shipped=_recipes(),
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs --cluster FILE"),
        (["--cluster", "nothing.toml"], "does not exist"),
        (["--cluster", "CLUSTER", "--top", "0"], "--top takes"),
        (["--cluster", "CLUSTER", "--runs", "nothing"], "--runs takes finished runs"),
        (["--cluster", "CLUSTER", "--init", "smollm2"], "--data.path"),
        (["--cluster", "CLUSTER", "--prices", "guess"], "--prices is closed, fluid or packets"),
        (["--cluster", "CLUSTER", "--prices", "fluid"], "need a network: give --network"),
        (["--cluster", "CLUSTER", "--prices", "fluid", "--network", "hc"], "did you mean 'hcc'"),
        (["--cluster", "CLUSTER", "--network", "hcc"], "--network does nothing without --prices"),
        (["--cluster", "CLUSTER", "--prices", "fluid", "--search", "alpa"], "--prices does nothing with --search alpa"),
        (["--cluster", "CLUSTER", "--search", "alpa", "--top", "3"], "--top does nothing with --search alpa"),
        (["--cluster", "CLUSTER", "--micro-batches", "3"], "--micro-batches does nothing without --search alpa"),
        (["--cluster", "CLUSTER", "--plan.remat", "rotor"], "leave --plan.remat out"),
    ],
)
def test_what_is_wrong_is_one_line(cluster, capsys, words, said):
    words = [str(cluster) if word == "CLUSTER" else word for word in words]
    assert main(["plan", "tiny_pretrain_cpu", *MODEL, *words]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.strip().count("\n") <= 1


def test_plans_are_priced_by_the_simulator(cluster, tmp_path, capsys):
    """Four nodes, two by two behind a thin link: the fluid price is that of the link, packets confirm it, and the plans follow it."""
    between = "nodes = 4\nbetween = { bandwidth = 12.5, latency_us = 10 }\n"
    cluster.write_text(CLUSTER.replace("nodes = 1\ngpus_per_node = 2\n", between + "gpus_per_node = 1\n"))
    network = tmp_path / "thin.toml"
    network.write_text(
        '[topology]\ntype = "leaf_spine"\nleaves = 2\nhosts_per_leaf = 2\nspines = 1\nspine_gbps = 50\n'
        '[workload]\ntype = "permutation"\n[transport]\ntype = "constant"\npayload = 4096\n'
    )
    words = ["plan", "tiny_pretrain_cpu", "--cluster", str(cluster), *MODEL, "--top", "20"]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prices"] is None
    words += ["--prices", "packets", "--network", str(network)]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = [plan["step_seconds"] for plan in found["plans"]]
    assert times == sorted(times)
    step = found["prices"]["step_seconds"]
    assert step["closed"] <= step["fluid"] and step["packets"] == pytest.approx(step["fluid"], rel=0.1)
    assert step["fluid"] == pytest.approx(times[found["chosen"]], rel=1e-9)
    assert found["prices"]["messages"]
    for row in found["prices"]["messages"]:
        assert row["closed"] < row["fluid"] and row["packets"] == pytest.approx(row["fluid"], rel=0.15)
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "by closed form" in text and "by packets" in text and "between nodes" in text


def test_price_and_energy_name_their_steps_and_units(cluster, capsys):
    words = ["plan", "tiny_pretrain_cpu", "--cluster", str(cluster), *MODEL, "--train.steps", "1234", "--top", "1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = found["plans"][0]
    assert found["steps"] == 1234 and plan["gpu_hours"] == pytest.approx(2 * 1234 * plan["step_seconds"] / 3600)
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "price, in USD, and energy: of the run's 1,234 steps" in text
    value, unit = text.strip().splitlines()[-1].split()[-2:]
    assert float(value) * {"Wh": 1e-6, "kWh": 1e-3, "MWh": 1.0}[unit] == pytest.approx(plan["energy_mwh"], rel=0.01)


def test_alpa_is_searched_explained_and_written(cluster, tmp_path, capfd):
    pytest.importorskip("highspy")
    out = tmp_path / "plan.toml"
    words = ["plan", "tiny_pretrain_cpu", "--cluster", str(cluster), *MODEL, "--search", "alpa", "--micro-batches", "2"]
    assert main([*words, "--json"]) == 0
    printed = capfd.readouterr().out  # with what C++ prints
    assert printed.startswith("{")  # the solver says nothing
    found = json.loads(printed)
    assert sum(stage["gpus"] for stage in found["stages"]) == 2
    picture = tmp_path / "plan.svg"
    assert main([*words, "--explain", "--out", str(out), "--picture", str(picture)]) == 0
    text = capfd.readouterr().out
    assert "after collectives:" in text and "as luban pretrain runs it: " in text
    assert ET.fromstring(picture.read_text()).tag.endswith("svg")
    written = tomllib.loads(out.read_text())
    assert written["plan"] == found["plan"]["plan"]
    assert written["predicted"]["step_seconds"] == pytest.approx(found["plan"]["step_seconds"])
    assert found["runs"] and "plan" in tomllib.loads(out.read_text())
    assert main([*words[:-1], "3"]) == 2 and "can't be cut into 3" in capfd.readouterr().err
    assert main([*words, "--search", "some"]) == 2


def test_alpa_says_what_would_hold_a_model_that_fits_nowhere(cluster, capsys):
    pytest.importorskip("highspy")
    words = ["plan", "luban_pretrain_gpu", "--cluster", str(cluster), "--search", "alpa", "--micro-batches", "8"]
    assert main([*words, "--model.preset", "llama2-70b", "--train.batch_size", "8"]) == 1
    error = capsys.readouterr().err
    assert "fits into no plan over 2 × h100-sxm" in error and " nodes (" in error and "would do" in error


def test_explain_shows_a_layer_of_the_best_plan(cluster, capsys):
    assert main(["plan", "tiny_pretrain_cpu", "--cluster", str(cluster), *MODEL, "--explain"]) == 0
    text = capsys.readouterr().out
    assert "after fuse:" in text and "after shard over a mesh of" in text


def test_what_zero_divides_is_printed(cluster, capsys):
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 GPUs."""
    assert state_by_zero(7_500_000_000, 64).endswith(
        ": 120 GB whole, 31.4 GB with ZeRO 1, 16.6 GB with ZeRO 2, 1.88 GB with ZeRO 3"
    )
    assert main(["plan", "tiny_pretrain_cpu", "--cluster", str(cluster), *MODEL]) == 0
    assert "at 2 + 2 + 12 bytes a parameter" in capsys.readouterr().out
