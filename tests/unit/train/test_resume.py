"""What may change when a run is taken up again, what may not, and finished runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from luban.core.artifact import open_artifact, read_manifest
from luban.core.errors import ArtifactError, ConfigError, TrainingError
from luban.core.resuming import marks
from luban.load.model import load_model
from luban.parallel.engine import TrainEngine
from luban.train.pretrain import pretrain
from luban.train.recipe import Recipe
from luban.train.saving import RunCheckpoints
from luban.train.validate import Validation, Validator

CONSTANT = {"type": "constant", "warmup": 2}  # whose factors don't depend on the number of steps


class PowerCut(BaseException):
    """Ends a run as a crash does: nothing is saved."""


@pytest.fixture
def cut(monkeypatch):
    """`cut(recipe, out, 5)` trains until a crash in step 5."""

    def run(recipe: Recipe, out: Path, step: int) -> None:
        submit, calls = TrainEngine.submit, iter(range(1, 10**6))

        def until(*args, **kwargs):
            if next(calls) == step:
                raise PowerCut
            return submit(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(TrainEngine, "submit", until)
            with pytest.raises(PowerCut):
                pretrain(recipe, out)

    return run


def hash_of(run: Path) -> str:
    return open_artifact(run, "run").figures["weights_hash"]


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_settings_may_change_on_resume_and_the_weights_stay_the_same(tiny, shards, cut, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(shards.parent)
    whole = pretrain(tiny(), tmp_path / "whole")
    cut(tiny(data={"path": shards.name}), tmp_path / "run", 4)
    other = {
        "data": {"workers": 2, "verify": True},
        "train": {"log_every": 3, "max_bad_steps": 2},
        "checkpoint": {"every": 5, "keep": 4},
        "validation": {"every": 6},
    }
    run = pretrain(tiny(**other), tmp_path / "run")
    assert hash_of(run) == hash_of(whole)
    changes = {
        row["field"]: (row["after_step"], row["old"], row["new"]) for row in read_manifest(run).figures["changes"]
    }
    assert changes == {
        "data.path": (2, shards.name, str(shards)),
        "data.workers": (2, None, 2),
        "data.verify": (2, False, True),
        "train.log_every": (2, 1, 3),
        "train.max_bad_steps": (2, 10, 2),
        "checkpoint.every": (2, 2, 5),
        "checkpoint.keep": (2, 2, 4),
        "validation.every": (2, 2, 6),
    }
    assert "train.log_every was 1, now 3" in capsys.readouterr().err
    assert read_manifest(run).settings["train"]["log_every"] == 3
    assert "log_every = 3" in (run / "recipe.toml").read_text()
    assert [row["step"] for row in rows_of(run) if "loss" in row] == [1, 2, 3, 6]


@pytest.mark.parametrize("finer", [{"train": {"accumulate": 4}}, {"plan": {"remat": "full"}}])
def test_what_an_out_of_memory_message_advises_can_be_resumed_with(tiny, cut, tmp_path, capsys, finer):
    whole = pretrain(tiny(optim={"eps": 1e-3}), tmp_path / "whole")
    cut(tiny(optim={"eps": 1e-3}), tmp_path / "run", 4)
    run = pretrain(tiny(optim={"eps": 1e-3}, **finer), tmp_path / "run")
    assert "differ by rounding" in capsys.readouterr().err
    ours, theirs = (load_model(path).module.parameters() for path in (run, whole))
    for a, b in zip(ours, theirs, strict=True):  # four updates of at most lr = 1e-3, each off by fp32 rounding
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    held = [[row for row in rows_of(path) if "heldout_loss" in row] for path in (run, whole)]
    assert [row["heldout_tokens"] for row in held[0]] == [row["heldout_tokens"] for row in held[1]]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"optim": {"lr": 5e-4}}, "optim.lr was 0.001, now 0.0005"),
        ({"train": {"batch_size": 2}}, "train.batch_size was 4, now 2"),
        ({"train": {"seed": 1}}, "seed was 0, now 1"),
        ({"train": {"precision": "bf16"}}, "train.precision was 'fp32', now 'bf16'"),
        ({"schedule": {"warmup": 3}}, "schedule.warmup was 2, now 3"),
        ({"validation": {"batches": 2}}, "validation.batches was 1, now 2"),
        ({"model": {"width": 64}}, "model.width was 32, now 64"),
    ],
)
def test_what_defines_the_result_is_refused_and_named(tiny, cut, tmp_path, change, named):
    cut(tiny(), tmp_path / "run", 4)
    with pytest.raises(ArtifactError, match=named):
        pretrain(tiny(**change), tmp_path / "run")
    run = pretrain(tiny(), tmp_path / "run")
    before = read_manifest(run)
    with pytest.raises(ArtifactError, match=f"finished run of another configuration .*{named}"):
        pretrain(tiny(**change), run)
    assert read_manifest(run) == before


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(tiny, tmp_path, capsys):
    run = pretrain(tiny(), tmp_path / "run")
    before = read_manifest(run), rows_of(run)
    assert pretrain(tiny(train={"log_every": 5}, checkpoint={"every": 3}), run) == run
    assert "is finished: nothing is left to train" in capsys.readouterr().err
    assert (read_manifest(run), rows_of(run)) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_finished_run_is_extended_and_equals_one_that_was_longer_from_the_start(tiny, tmp_path, capsys):
    whole = pretrain(tiny(schedule=CONSTANT, train={"steps": 10}), tmp_path / "whole")
    run = pretrain(tiny(schedule=CONSTANT), tmp_path / "run")
    assert pretrain(tiny(schedule=CONSTANT, train={"steps": 10}), run) == run
    assert hash_of(run) == hash_of(whole) and open_artifact(run).content_hash == open_artifact(whole).content_hash
    assert [row["step"] for row in rows_of(run) if "loss" in row] == list(range(1, 11))
    err = capsys.readouterr().err
    assert "train.steps was 6, now 10" in err and "from step 6 to step 10" in err
    with pytest.raises(ConfigError, match=r"has trained 10 steps already.*--train.steps 10 or more"):
        pretrain(tiny(schedule=CONSTANT, train={"steps": 9}), run)
    assert hash_of(run) == hash_of(whole)


def test_the_consequence_for_the_schedule_is_said(tiny, tmp_path, capsys):
    cosine = {"type": "cosine", "warmup": 2, "final": 0.1}
    run = pretrain(tiny(schedule=cosine), tmp_path / "run")
    pretrain(tiny(schedule=cosine, train={"steps": 12}), run)
    share = (6 - 1) / (12 - 1 - 1)  # of the cosine that lies behind step 6 of 12, from the end of warm-up
    factor = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * share))
    assert f"the next step is {1e-3 * factor:.3g}, that of the last step was 0.0001" in capsys.readouterr().err
    assert [row["lr"] for row in rows_of(run) if row["step"] == 7 and "lr" in row] == [pytest.approx(1e-3 * factor)]


def test_a_run_that_a_budget_ended_is_extended_by_a_larger_one(tiny, tmp_path, monkeypatch):
    """By a clock on which a step takes an eighth of a second and everything else takes no time."""
    from clock import Clock

    from luban.train.run import train

    clock, submit = Clock(), TrainEngine.submit
    monkeypatch.setattr(TrainEngine, "submit", lambda *args, **kwargs: clock.advance(0.125) or submit(*args, **kwargs))

    def run(seconds: float) -> tuple[int, float]:
        recipe = tiny(
            train={"steps": 10**6, "budget_seconds": seconds, "log_every": 50},
            checkpoint={"every": 10**6},
            validation={"every": 0},
        )
        figures = open_artifact(train(recipe, tmp_path / "run", task="pretrain", name="x", clock=clock)).figures
        return figures["step"], figures["seconds"]

    assert run(4.0) == (30, 30 * 0.125)  # 95% of the budget
    assert run(8.0) == (60, 60 * 0.125)


def test_equal_runs_have_equal_content_hashes_wherever_and_however_they_are_logged(
    tiny, shards, cut, tmp_path, monkeypatch
):
    monkeypatch.chdir(shards.parent)
    first = pretrain(tiny(), tmp_path / "a")
    second = pretrain(
        tiny(data={"path": shards.name}, train={"log_every": 4}, checkpoint={"every": 1, "keep": 5}), tmp_path / "b"
    )
    cut(tiny(), tmp_path / "c", 4)
    third = pretrain(tiny(), tmp_path / "c")
    hashes = {open_artifact(run, "run").content_hash for run in (first, second, third)}
    assert len(hashes) == 1
    assert open_artifact(pretrain(tiny(train={"seed": 1}), tmp_path / "d")).content_hash not in hashes
    last = load_model(first).path
    state = json.loads((last / "state.json").read_text())
    assert "seconds" not in state["progress"] and open_artifact(last).figures["seconds"] > 0


def test_a_checkpoint_is_saved_whenever_the_held_out_loss_is_the_lowest_so_far(tiny, tmp_path, monkeypatch):
    losses = dict(enumerate([4.0, 3.0, math.nan, 3.5, 2.0, 2.5, 2.0, 2.6, 2.7], start=1))
    saved, write = [], RunCheckpoints.begin
    monkeypatch.setattr(
        RunCheckpoints, "begin", lambda run, state: saved.append(state.progress.step) or write(run, state)
    )
    scripted = iter(losses.values())
    monkeypatch.setattr(
        Validator, "__call__", lambda *_: Validation(loss=next(scripted), tokens=1, seq_len=32, bits_per_byte=None)
    )
    recipe = tiny(train={"steps": 9}, checkpoint={"every": 8, "keep": 1}, validation={"every": 1})
    run = pretrain(recipe, tmp_path / "run")
    assert saved == [1, 2, 5, 8, 9]
    figures = open_artifact(run, "run").figures
    assert figures["checkpoints"] == {"best": "step_000005", "last": "step_000009"}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_000005", "step_000009"]
    assert load_model(run).path.name == "step_000005"
    assert [row["heldout_loss"] for row in rows_of(run) if row["step"] == 3 and "heldout_loss" in row] == [None]


def test_a_step_that_ends_a_run_has_its_row_and_no_row_holds_nan(tiny, tmp_path):
    recipe = tiny(train={"steps": 30, "log_every": 100, "max_bad_steps": 2}, optim={"lr": 1e30})
    with pytest.raises(TrainingError, match=r"stopped at step (\d+)") as stopped:
        pretrain(recipe, tmp_path / "run")
    text = (tmp_path / "run.incomplete" / "metrics.jsonl").read_text()
    refuse = pytest.fail
    rows = [json.loads(line, parse_constant=lambda name: refuse(f"{name} is no JSON")) for line in text.splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert f"stopped at step {steps[-1]}:" in str(stopped.value) and rows[-1]["bad_steps"] == 2
    assert rows[-1]["grad_norm"] is None and steps == [1, steps[-1]]


def test_a_warm_up_longer_than_the_run_is_said(tiny, tmp_path, capsys):
    pretrain(tiny(schedule={"warmup": 24}), tmp_path / "run")
    err = capsys.readouterr().err
    assert "schedule.warmup is 24 steps and the run has 6: the learning rate only rises, to 25% of its peak" in err


def test_every_field_that_only_says_where_and_how_to_run_is_marked():
    names = ("seed", "batch_size", "seq_len", "precision", "weights", "clip", "neftune", "embedding_gradient")
    unmarked = {f"train.{name}" for name in names}
    fields = {f"train.{name}" for name in vars(Recipe().train)}
    assert fields - set(marks(Recipe())) == unmarked
