"""The account of a run: published tables to rounding, identities on random runs, and refusals."""

from __future__ import annotations

import json
import random
import re

import pytest

from luban.cli.main import main
from luban.core.errors import ConfigError
from luban.planner.accelerators import accelerator
from luban.planner.accounting.account import account, assumptions, constants, published_runs, training_flops

A100 = accelerator("a100-80gb")


def _of(name):
    run = published_runs()[name]
    assumed = assumptions(A100, watts=run.watts)
    return run, account(A100, assumed, flops=training_flops(run.parameters, run.tokens), gpu_hours=run.gpu_hours)


@pytest.mark.parametrize("name", published_runs())
def test_published_energy_and_carbon(name):
    """LLaMA's table 15 rounds to whole MWh and tonnes (its 65B to the MWh below), Llama 2's table 2 to 0.01 t."""
    run, found = _of(name)
    if run.mwh is not None:
        assert run.mwh in (round(found.energy_mwh), int(found.energy_mwh)) and run.tonnes == round(found.carbon_tonnes)
    else:
        assert found.carbon_tonnes == pytest.approx(run.tonnes, abs=0.02)


def test_published_utilisation():
    """6·N·D over hours and the A100's peak, computed by hand from the same tables."""
    for name, percent in {"llama2-7b": 40.6, "llama2-13b": 37.7, "llama2-70b": 43.5}.items():
        assert 100 * _of(name)[1].utilisation == pytest.approx(percent, abs=0.1)


def test_the_assumed_utilisation_lies_in_the_range_that_its_source_states():
    """Which is that of the published runs."""
    seen = [100 * _of(name)[1].utilisation for name in published_runs()]
    assumed = constants()["utilisation"]
    low, high = map(int, re.findall(r"(\d+) to (\d+)%", assumed.source)[0])
    assert (low, high) == (round(min(seen)), round(max(seen))) and low < 100 * assumed.value < high


def test_both_readings_of_a_point():
    run, _ = _of("llama2-70b")
    assumed = assumptions(A100, price_per_hour=20.0)
    found = account(A100, assumed, flops=training_flops(run.parameters, run.tokens), gpu_hours=1_720_320)
    assert found.price == 34_406_400
    assert found.point_saves.one_percent.gpu_hours == pytest.approx(17_203.2)
    assert found.point_saves.one_percent.price == pytest.approx(344_064)
    raised = account(A100, assumed, flops=found.flops, utilisation=found.utilisation + 0.01)
    assert found.point_saves.percentage_point.gpu_hours == pytest.approx(1_720_320 - raised.gpu_hours)
    assert found.point_saves.percentage_point.price == pytest.approx(found.price - raised.price)
    assert found.point_saves.percentage_point.gpu_hours == pytest.approx(1_720_320 * 0.01 / 0.4447, rel=1e-3)


def test_each_of_flops_hours_and_utilisation_follows_from_the_others():
    rng = random.Random(7)
    for _ in range(50):
        hours, used = 10 ** rng.uniform(0, 8), rng.uniform(0.01, 1)
        assumed = assumptions(
            A100, watts=rng.uniform(1, 1000), pue=rng.uniform(1, 2), price_per_hour=rng.uniform(0, 50)
        )
        first = account(A100, assumed, gpu_hours=hours, utilisation=used)
        assert first.flops == pytest.approx(hours * 3600 * 312e12 * used)
        for known in ({"flops": first.flops, "utilisation": used}, {"flops": first.flops, "gpu_hours": hours}):
            other = account(A100, assumed, **known)
            assert (other.gpu_hours, other.utilisation) == pytest.approx((hours, used))
            assert other.carbon_tonnes == pytest.approx(hours * assumed.watts * assumed.pue * 0.385e-6)
            assert not other.utilisation_assumed
    guess = account(A100, assumed, gpu_hours=hours)
    assert guess.utilisation_assumed and guess.utilisation == constants()["utilisation"].value


def test_people_and_trees():
    found = account(A100, assumptions(A100), gpu_hours=1_720_320)
    assert found.people_years == pytest.approx(291.422 / 5.0, rel=1e-4)
    assert found.trees == pytest.approx(291.422 / 0.022, rel=1e-4)
    assert all(row.unit and row.source for row in constants().values())


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({}, "needs GPU-hours"),
        ({"gpu_hours": -1.0}, "gpu_hours is a number above 0"),
        ({"gpu_hours": float("nan")}, "gpu_hours is a number above 0"),
        ({"gpu_hours": 1.0, "utilisation": 43.0}, "0.43 for 43%"),
        ({"gpu_hours": 1.0, "flops": 1e20}, "times the peak .* at least 89 GPU-hours"),
        ({"gpu_hours": 1.0, "flops": 1e12, "utilisation": 0.5}, "leave one of the three out"),
    ],
)
def test_what_cannot_be_is_refused(known, message):
    with pytest.raises(ConfigError, match=message):
        account(A100, assumptions(A100), **known)


@pytest.mark.parametrize("change", [{"pue": 0.9}, {"watts": -1.0}, {"price_per_hour": float("nan")}, {"tree": 0.0}])
def test_assumptions_are_checked(change):
    with pytest.raises(ConfigError):
        assumptions(A100, **change)


def test_command_line(capsys):
    words = ["account", "--gpu-hours", "1720320", "--gpu", "a100-80gb", "--parameters", "70e9", "--tokens", "2e12"]
    assert main([*words, "--price", "20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [
        "flops",
        "gpu_hours",
        "utilisation",
        "energy_mwh",
        "carbon_tonnes",
        "people_years",
        "trees",
        "price",
        "point_saves",
    ]
    assert set(names) <= set(found) and found["utilisation"] == pytest.approx(0.4347, abs=1e-4)
    assert main([*words, "--price", "20", "--currency", "yuan"]) == 0
    shown = capsys.readouterr().out
    assert (
        "344,064 yuan: 1% fewer GPU-hours" in shown and "one percentage point of utilisation (43.5% → 44.5%)" in shown
    )
    assert main(["account", "--published"]) == 0
    assert "llama2-70b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --gpu-hours"),
        (["--gpu-hours", "1", "--gpu", "a100-80g"], "did you mean 'a100-80gb'"),
        (["--parameters", "1e9"], "--tokens is missing"),
        (["--tokens", "1e9"], "--model (or --parameters) is missing"),
        (["--parameters", "-1", "--tokens", "1e9"], "--parameters is a number above 0"),
        (["--picture", "a.svg"], "--picture does nothing without --history"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, message, capsys):
    assert main(["account", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
