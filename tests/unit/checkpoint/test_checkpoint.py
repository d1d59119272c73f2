"""Checkpoints: whole or not at all, bit for bit, and refused when touched."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch

from luban.checkpoint.checkpoint import Checkpoint, load_checkpoint
from luban.checkpoint.manager import CheckpointManager
from luban.checkpoint.saver import save_checkpoint
from luban.checkpoint.weights import weights_hash
from luban.core.errors import ArtifactError


def checkpoint(step: int = 1) -> Checkpoint:
    model = {"a.weight": torch.randn(3, 4), "b": torch.randn(2).bfloat16()}
    return Checkpoint(
        spec={"width": 4},
        model=model,
        optimizer={"b/exp_avg": torch.randn(2)},
        random={"cpu": torch.get_rng_state()},
        state={"step": step},
    )


def test_weights_hash_is_what_the_design_says():
    weights = {"z": torch.tensor([1.5, -2.0]), "a": torch.tensor([[3]], dtype=torch.int64)}
    digest = hashlib.sha256()
    digest.update(b"a\0int64\x001,1\0" + struct.pack("<q", 3))
    digest.update(b"z\0float32\x002\0" + struct.pack("<2f", 1.5, -2.0))
    assert weights_hash(weights) == digest.hexdigest()
    strided = torch.randn(4, 4)
    assert weights_hash({"w": strided.T}) == weights_hash({"w": strided.T.contiguous()})
    assert weights_hash({"w": strided.reshape(2, 8)}) != weights_hash({"w": strided})


def test_round_trip_is_exact(tmp_path):
    saved = checkpoint()
    save_checkpoint(tmp_path / "c", saved)
    found = load_checkpoint(tmp_path / "c")
    assert found.spec == saved.spec and found.state == saved.state
    for collection in ("model", "optimizer", "random"):
        before, after = getattr(saved, collection), getattr(found, collection)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[k], after[k]) and before[k].dtype == after[k].dtype for k in before)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "spec.json"])
@pytest.mark.parametrize("harm", ["truncate", "edit", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name, harm):
    save_checkpoint(tmp_path / "c", checkpoint())
    file = tmp_path / "c" / name
    data = file.read_bytes()
    if harm == "remove":
        file.unlink()
    else:
        file.write_bytes(data[:-3] if harm == "truncate" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"c is damaged: .*{name}"):
        load_checkpoint(tmp_path / "c")


def test_weights_exchanged_together_with_the_manifest_entry_are_refused(tmp_path):
    save_checkpoint(tmp_path / "c", checkpoint())
    path = tmp_path / "c" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["figures"]["weights_hash"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="weights_hash"):
        load_checkpoint(tmp_path / "c")


def test_resume_falls_back_past_damage_and_crash_leftovers(tmp_path, capsys):
    series = CheckpointManager(tmp_path)
    for step in (10, 20, 30):
        save_checkpoint(series.path(step), checkpoint(step))
    (series.folder / "step_000040.incomplete").mkdir()
    file = series.path(30) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    step, found = series.resume()
    assert (step, found.state["step"]) == (20, 20)
    assert "step_000030" in capsys.readouterr().err
    assert series.steps() == [10, 20]
    assert sorted(p.name for p in series.folder.iterdir()) == ["step_000010", "step_000020"]
    assert CheckpointManager(tmp_path / "nowhere").resume() is None


def test_keep_leaves_the_newest_and_the_best(tmp_path):
    series = CheckpointManager(tmp_path)
    for step in range(1, 7):
        save_checkpoint(series.path(step), checkpoint(step))
    series.keep(2, best=3)
    assert series.steps() == [3, 5, 6]
    series.keep(1, best=None)
    assert series.steps() == [6]
