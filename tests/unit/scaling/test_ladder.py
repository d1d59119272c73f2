"""A power law through a ladder of models, and what it says of the next."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from training_data import make_shards

from luban.cli.main import main
from luban.core.errors import ConfigError, DataError
from luban.scaling.ladder import power_law
from luban.train.ladder import rung_recipe
from luban.train.recipe import DataConfig, Recipe, TrainConfig


def test_constants_of_a_power_are_recovered():
    rng = random.Random(random.randrange(10**6))
    factor, exponent = rng.uniform(1, 50), rng.uniform(0.02, 0.2)
    flops = [10.0**n for n in range(8, 13)]
    law = power_law(flops, [factor * c**-exponent for c in flops])
    assert law.factor == pytest.approx(factor) and law.exponent == pytest.approx(exponent)
    low, high = law.interval(1e14)
    assert low == pytest.approx(law.loss(1e14), rel=1e-6) == pytest.approx(high, rel=1e-6)


def test_intervals_cover_the_next_size():
    """95% of it within binomial error, by simulation."""
    rng = np.random.default_rng()
    flops, hits = [1e8, 3e8, 1e9, 3e9], 0
    for _ in range(500):
        losses = [20 * c**-0.1 * float(np.exp(rng.normal(0, 0.02))) for c in [*flops, 1e10]]
        low, high = power_law(flops, losses[:-1]).interval(1e10)
        hits += low <= losses[-1] <= high
    assert 0.91 <= hits / 500 <= 0.985


def test_a_line_needs_three_sizes_and_numbers():
    with pytest.raises(DataError, match="3 sizes"):
        power_law([1.0, 2.0, 2.0], [3.0, 2.0, 2.0])
    with pytest.raises(DataError, match="above 0"):
        power_law([1.0, 2.0, 3.0], [3.0, float("nan"), 2.0])


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    return str(make_shards(tmp_path_factory.mktemp("ladder")))


def test_rungs_grow_together(shards):
    recipe = Recipe(data=DataConfig(path=shards), train=TrainConfig(batch_size=4, seq_len=16))
    sizes = {}
    for width in (8, 16, 64):
        changed, layers, parameters = rung_recipe(recipe, width, 20)
        sizes[width] = parameters
        assert changed.train.steps * 64 == pytest.approx(20 * parameters, abs=64)
        assert layers == max(2, width // 16)
        assert changed.schedule.warmup <= changed.train.steps
    assert sizes[64] > 4 * sizes[16] > 8 * sizes[8]
    with pytest.raises(ConfigError, match="multiples of 8"):
        rung_recipe(recipe, 12, 20)


def test_a_ladder_is_fitted_extrapolated_and_checked(shards, tmp_path, capsys, monkeypatch):
    """With runs that are said to follow a law, and a last one that is worse."""

    def trained(recipe, out, name):
        width = recipe.model.given["width"]
        out.mkdir(parents=True, exist_ok=True)
        loss = {8: 4.0, 16: 3.5, 24: 3.3, 32: 9.0}[width]
        (out / "metrics.jsonl").write_text(json.dumps({"step": 1, "heldout_loss": loss}) + "\n")
        return out

    monkeypatch.setattr("luban.train.ladder.pretrain", trained)
    words = ["scaling", "ladder", "luban_ladder_cpu", "--data.path", shards, "--out", str(tmp_path / "l")]
    assert main([*words, "--widths", "8", "16", "24", "--check", "32", "--ratio", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    flops = [row["flops"] for row in found["rungs"]]
    law = power_law(flops, [4.0, 3.5, 3.3])
    assert found["law"]["exponent"] == pytest.approx(law.exponent)
    assert found["check"]["predicted"] == pytest.approx(law.loss(found["check"]["flops"]))
    assert not found["check"]["inside"] and found["check"]["error"] > 1
    assert (tmp_path / "l" / "ladder.csv").read_text().startswith("parameters,tokens,loss,width\n")


@pytest.mark.slow  # trains four models
def test_a_ladder_on_the_command_line(shards, tmp_path, capsys):
    out = tmp_path / "ladder"
    words = ["scaling", "ladder", "luban_ladder_cpu", "--data.path", shards, "--out", str(out)]
    words += ["--widths", "8", "16", "24", "--check", "32", "--ratio", "0.05", "--train.batch_size", "2"]
    words += ["--train.seq_len", "16", "--validation.batches", "1", "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["width"] for row in found["rungs"]] == [8, 16, 24]
    low, high = found["check"]["interval"]
    assert found["check"]["inside"] == (low <= found["check"]["loss"] <= high)
    assert len((out / "ladder.csv").read_text().splitlines()) == 5
    assert main(words) == 0  # finished runs are read
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths", "8", "16"], "three different widths"),
        (["--check", "8"], "wider than the ladder"),
        (["--ratio", "none"], "--ratio takes"),
        (["--widths", "8", "20", "24", "--check", "0"], "multiples of 8"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(shards, tmp_path, capsys, words, said):
    call = ["scaling", "ladder", "luban_ladder_cpu", "--data.path", shards, "--out", str(tmp_path / "l")]
    assert main([*call, "--ratio", "0.05", *words]) == 2
    assert said in capsys.readouterr().err
