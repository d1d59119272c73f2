"""Spikes in the loss: found by their distance from the steps before, passed by going back and leaving their batches out."""

from __future__ import annotations

import json
import math
import random

import pytest

from luban.core.artifact import open_artifact
from luban.core.config import from_dict
from luban.core.errors import ConfigError
from luban.data.loader import Loader
from luban.optim.schedule.constant import Constant
from luban.train.pretrain import pretrain
from luban.train.spikes import SpikeConfig, SpikeDetector

BAD = 23  # the batch that is spoiled, from 0


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_spike_stands_out_of_noise_and_of_a_falling_loss():
    detector, rng = SpikeDetector(SpikeConfig(action="report")), random.Random(random.randrange(1000))
    for step in range(400):
        assert detector.observe(2 + 3 * math.exp(-step / 50) + rng.gauss(0, 0.03), abs(rng.gauss(1, 0.1))) is None, step
    found = detector.observe(3.0, 1.0)
    assert found is not None and found.what == "loss" and found.sigmas > 8 and "loss 3" in str(found)
    norm = detector.observe(2.0, 4.0)
    assert norm is not None and norm.what == "gradient norm"
    assert detector.observe(2.0, 1.0) is None
    assert detector.observe(float("nan"), 1.0) is None  # skipped by the trainer anyway


def test_deviations_are_robust_and_have_a_floor():
    detector = SpikeDetector(SpikeConfig(action="report", sigmas=5, window=21, least=5))
    values = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 1.0]
    for value in values:
        detector.observe(value, 1.0)
    found = detector.observe(2.0, 1.0)
    assert found is not None and found.median == 1.0
    assert found.sigmas == pytest.approx((2.0 - 1.0) / (1.4826 * 0.1))
    still = SpikeDetector(SpikeConfig(action="report", least=2))
    assert [still.observe(value, 0.0) for value in (1.0, 1.0, 1.0, 1.05)] == [None] * 4
    assert still.observe(1.2, 0.0) is not None  # 20 deviations of 1%
    still.reset()
    assert still.observe(100.0, 0.0) is None


@pytest.fixture
def spoiled(monkeypatch):
    """All targets of batch number BAD are one word that never occurs; numbers of the batches that are trained on."""
    read, whole = [], Loader.iterate

    def iterate(self, start_step=0):
        for number, batch in enumerate(whole(self, start_step), start_step):
            read.append(number)
            if number == BAD:
                batch.targets[:] = 298
            yield batch

    monkeypatch.setattr(Loader, "iterate", iterate)
    return read


LONG = {"train": {"steps": 40}, "optim": {"lr": 5e-3}, "checkpoint": {"every": 10}, "validation": {"every": 0}}
WATCH = {"action": "skip", "sigmas": 5.0, "window": 12, "least": 8}


def heldout(run):
    return [row["heldout_loss"] for row in rows(run) if "heldout_loss" in row][-1]


def test_a_bad_batch_is_found_and_passed(tiny, tmp_path, spoiled, monkeypatch, capsys):
    run = pretrain(tiny(**LONG, spikes={**WATCH, "beyond": 1}), tmp_path / "passed")
    assert "spike at step 24: " in capsys.readouterr().err
    figures = open_artifact(run, "run").figures
    assert [spike["step"] for spike in figures["spikes"]] == [24] and figures["step"] == 40
    assert spoiled == [*range(24), *range(25, 45)]  # back to step 20, and on behind one more batch
    (event,) = [row for row in rows(run) if "back_to" in row]
    assert (event["step"], event["back_to"], event["left_out"]) == (24, 20, 5)
    monkeypatch.undo()
    clean = pretrain(tiny(**LONG), tmp_path / "clean")
    assert heldout(run) == pytest.approx(heldout(clean), rel=0.01)


def test_a_step_at_far_too_high_a_rate_is_found_and_passed(tiny, tmp_path, monkeypatch):
    """Going back undoes it; a run that only reports it does not recover in time."""
    given: dict = {**LONG, "optim": {"lr": 2e-3}, "schedule": {"type": "constant", "warmup": 5}}
    clean, whole, planted = pretrain(tiny(**given), tmp_path / "clean"), Constant.factor, set()

    def factor(self, step, steps):
        first = step == BAD and not planted
        planted.update([step] * first)
        return whole(self, step, steps) * (1000 if first else 1)

    monkeypatch.setattr(Constant, "factor", factor)
    passed = pretrain(tiny(**given, spikes=WATCH), tmp_path / "passed")
    assert open_artifact(passed, "run").figures["spikes"][0]["step"] in (
        BAD + 2,
        BAD + 3,
    )  # seen by the steps that follow
    assert heldout(passed) == pytest.approx(heldout(clean), rel=0.01)
    planted.clear()
    hurt = pretrain(tiny(**given, spikes={**WATCH, "action": "report"}), tmp_path / "hurt")
    assert heldout(hurt) > 1.05 * heldout(clean)


def test_a_run_that_went_back_resumes_behind_what_it_left_out_at_its_lower_rate(tiny, tmp_path, spoiled):
    given: dict = {**LONG, "spikes": {**WATCH, "cooling": 0.5}, "schedule": {"type": "constant", "warmup": 2}}
    pretrain(tiny(**{**given, "train": {"steps": 26}}), tmp_path / "run")
    run = pretrain(tiny(**{**given, "train": {"steps": 30}}), tmp_path / "run")
    assert spoiled == [*range(24), *range(24, 34)]  # steps 21 to 30 read batches 25 to 34
    rates = [row["lr"] for row in rows(run) if "lr" in row]
    assert rates[2:23] == pytest.approx([5e-3] * 21) and rates[-9:] == pytest.approx([2.5e-3] * 9)


def test_what_is_only_reported_changes_nothing(tiny, tmp_path, spoiled, capsys):
    run = pretrain(tiny(**{**LONG, "train": {"steps": 26}}, spikes={**WATCH, "action": "report"}), tmp_path / "run")
    assert "spike at step 24" in capsys.readouterr().err and spoiled == [*range(26)]
    assert next(row["step"] for row in rows(run) if "spike" in row) == 24 and not any(
        "back_to" in row for row in rows(run)
    )


@pytest.mark.parametrize(
    "wrong", [{"action": "ignore"}, {"sigmas": 0}, {"cooling": 0}, {"least": 1}, {"window": 3}, {"beyond": -1}]
)
def test_nonsense_is_refused(wrong):
    with pytest.raises(ConfigError):
        from_dict(SpikeConfig, wrong)
