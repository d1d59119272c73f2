"""Runs that end early: after a number of epochs, or when the held-out loss stops improving."""

from __future__ import annotations

import json
from itertools import chain, repeat

import pytest

from luban.core.artifact import open_artifact
from luban.data.shards import Shards
from luban.optim.schedule.constant import Constant
from luban.optim.schedule.cosine import Cosine
from luban.optim.schedule.wsd import WarmupStableDecay
from luban.train.pretrain import pretrain
from luban.train.run import dry_run, rows_of, within_epochs
from luban.train.validate import Validation, Validator


@pytest.fixture
def losses(monkeypatch):
    """`losses(3.0, 2.0, …)`: what the validations of the next run measure; the last one again and again."""

    def give(*values: float) -> None:
        found = chain(values, repeat(values[-1]))
        measured = lambda *_: Validation(loss=next(found), tokens=1, bits_per_byte=None, seq_len=8)  # noqa: E731
        monkeypatch.setattr(Validator, "__call__", measured)

    return give


def validations(run) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["heldout_loss"]) for row in rows if "heldout_loss" in row]


def rates(run) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["lr"] for row in rows if "lr" in row]


def test_epochs_are_passes_over_the_rows_of_the_objective(tiny, shards):
    recipe = tiny(train={"epochs": 2.5, "steps": 10**6})
    rows = rows_of(recipe, Shards.open(shards, "train")).rows
    batch = recipe.train.batch_size
    steps = within_epochs(recipe, Shards.open(shards, "train")).train.steps
    assert (steps - 1) * batch < 2.5 * rows <= steps * batch
    assert within_epochs(tiny(train={"epochs": 2.5, "steps": 3}), Shards.open(shards, "train")).train.steps == 3
    assert within_epochs(tiny(train={"epochs": 1e-9}), Shards.open(shards, "train")).train.steps == 1


def test_a_run_ends_after_its_epochs(tiny, shards, tmp_path, capsys):
    rows = rows_of(tiny(), Shards.open(shards, "train")).rows
    recipe = tiny(train={"epochs": 5 * tiny().train.batch_size / rows, "steps": 1000})
    dry_run(recipe)
    assert open_artifact(pretrain(recipe, tmp_path / "run"), "run").figures["step"] == 5


def test_a_constant_rate_ends_at_once_and_stands_for_the_best_checkpoint(tiny, losses, tmp_path, capsys):
    losses(3.0, 2.0, 2.5, 2.4, 2.6)
    recipe = tiny(
        schedule={"type": "constant", "warmup": 1},
        train={"steps": 20, "log_every": 1},
        validation={"every": 2, "patience": 2},
    )
    run = pretrain(recipe, tmp_path / "run")
    assert validations(run) == [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.4)] and len(rates(run)) == 8
    manifest = open_artifact(run, "run")
    assert manifest.figures["step"] == 8 and manifest.figures["checkpoints"]["best"] == "step_000004"
    said = capsys.readouterr().err
    assert "not improved for 2 validations (lowest: 2.000 at step 4): training ends here" in said


def test_a_decaying_schedule_decays_first(tiny, losses, tmp_path, capsys):
    losses(3.0, 3.5)
    recipe = tiny(
        schedule={"type": "wsd", "warmup": 1, "decay": 0.2},
        train={"steps": 100, "log_every": 1},
        validation={"every": 4, "patience": 1},
    )
    run = pretrain(recipe, tmp_path / "run")
    lr = recipe.optim.lr
    assert open_artifact(run, "run").figures["step"] == 10  # the decay is 2 of 10 steps
    assert rates(run) == pytest.approx([lr] * 8 + [lr / 2, 0.0])
    assert "the learning rate decays from now on, and training ends after step 10" in capsys.readouterr().err


def test_a_run_that_was_killed_after_its_early_end_was_decided_ends_alike(tiny, losses, tmp_path):
    recipe = tiny(
        schedule={"type": "wsd", "warmup": 1, "decay": 0.5},
        train={"steps": 100, "log_every": 1},
        validation={"every": 3, "patience": 1},
    )
    losses(3.0, 3.5)
    whole = pretrain(recipe, tmp_path / "whole")
    from luban.parallel.engine import TrainEngine

    class PowerCut(BaseException):
        pass

    submit, calls = TrainEngine.submit, iter(range(1, 1000))

    def until(*args, **kwargs):
        if next(calls) == 9:
            raise PowerCut
        return submit(*args, **kwargs)

    losses(3.0, 3.5)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(PowerCut):
        patched.setattr(TrainEngine, "submit", until)
        pretrain(recipe, tmp_path / "run")
    losses(3.5)
    pretrain(recipe, tmp_path / "run")
    hashes = [open_artifact(run, "run").figures["weights_hash"] for run in (whole, tmp_path / "run")]
    assert hashes[0] == hashes[1] and rates(tmp_path / "run") == rates(whole)
    assert open_artifact(whole, "run").figures["step"] == 12


def test_without_patience_overfitting_is_warned_of_once_and_training_goes_on(tiny, losses, tmp_path, capsys):
    losses(2.0, 2.5)
    recipe = tiny(train={"steps": 8}, validation={"every": 1})
    assert open_artifact(pretrain(recipe, tmp_path / "run"), "run").figures["step"] == 8
    assert capsys.readouterr().err.count("the model is overfitting; use --validation.patience to stop early") == 1


def test_patience_without_validations_is_refused(tiny):
    with pytest.raises(Exception, match=r"validation\.every is 0"):
        tiny(validation={"every": 0, "patience": 2})


@pytest.mark.parametrize("step", [1, 5, 70, 81, 99])
def test_when_schedules_end(step):
    assert Cosine().ends_early(step, 100) == Constant().ends_early(step, 100) == step
    end = WarmupStableDecay(warmup=0, decay=0.2).ends_early(step, 100)
    assert end == {1: 2, 5: 6, 70: 88, 81: 100, 99: 100}[step]
    schedule = WarmupStableDecay(warmup=0, decay=0.2)
    assert all(schedule.factor(at, end) == 1 for at in range(round(end * 0.8)))
