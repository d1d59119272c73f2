"""Runs whose optimizer averages weights: what is validated, saved and loaded is the average, and training goes on at the other."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import luban
from luban.checkpoint.reader import CheckpointReader
from luban.core.errors import ConfigError
from luban.objectives.causal import Causal
from luban.train.pretrain import pretrain
from luban.train.recipe import Recipe
from luban.train.run import assemble, open_run

CHANGES = {"optim": {"type": "schedule_free", "lr": 0.01}, "schedule": {"type": "constant", "warmup": 2}}


def checkpoint(run, step: int):
    return run / "checkpoints" / f"step_{step:06d}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_resumes_bitwise_and_is_measured_at_the_average(tiny, tmp_path, precision):
    changes = {**CHANGES, "train": {"precision": precision}}
    whole = pretrain(tiny(**changes), tmp_path / "whole", "whole")
    train = {"precision": precision, "steps": 4}
    pretrain(tiny(**{**changes, "train": train}), tmp_path / "halves", "halves")
    halves = pretrain(tiny(**changes), tmp_path / "halves", "halves")
    saved = [CheckpointReader.open(checkpoint(run, 6)) for run in (whole, halves)]
    for collection in ("model", "optimizer"):
        ours, theirs = (dict(each.tensors(collection)) for each in saved)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    model, state = (dict(saved[0].tensors(collection)) for collection in ("model", "optimizer"))
    for name, x in model.items():
        y, z = state[f"{name}/trained"], state[f"{name}/z"]
        torch.testing.assert_close(y, 0.9 * x + 0.1 * z, rtol=1e-5, atol=1e-6)
        assert not torch.equal(x, y)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    measured = [row["heldout_loss"] for row in rows if "heldout_loss" in row][-1]
    recipe, shards, start, device = open_run(tiny(**{**changes, "train": {"precision": "fp32"}}))
    parts = assemble(recipe, shards, start, device)
    loaded = luban.load_model(checkpoint(whole, 6))
    loss, total, count = Causal().loss(loaded.module), 0.0, 0
    for batch in parts.validator.batches_once():
        tensors = {name: torch.from_numpy(array) for name, array in batch.arrays().items()}
        total, count = total + loss(tensors).sum.item(), count + batch.target_count
    assert measured == pytest.approx(total / count, rel=1e-5 if precision == "fp32" else 5e-3)


def test_measuring_changes_nothing_that_is_trained(tiny, tmp_path):
    often = pretrain(tiny(**CHANGES, validation={"every": 1}), tmp_path / "often", "often")
    never = pretrain(tiny(**CHANGES, validation={"every": 0}), tmp_path / "never", "never")
    ours, theirs = (load_file(checkpoint(run, 6) / "model.safetensors") for run in (often, never))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_decaying_schedule_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"schedule_free averages weights .*give --schedule.type constant"):
        tiny(optim={"type": "schedule_free"})
    assert isinstance(tiny(**CHANGES), Recipe)
