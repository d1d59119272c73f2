"""Shards of any size are opened without being read."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from luban.core.errors import ArtifactError
from luban.parallel.engine import TrainEngine
from luban.train.pretrain import pretrain

SIZE = 20 * 2**30  # bytes of tokens
DOCUMENTS = 5


@pytest.fixture
def huge(shards, tmp_path) -> Path:
    """The shards with a training split of zeros, which takes no disk."""
    folder = shutil.copytree(shards, tmp_path / "huge")
    tokens, offsets = folder / "train-00000.tokens", folder / "train-00000.offsets"
    with tokens.open("wb") as file:
        file.truncate(SIZE)
    np.linspace(0, SIZE // 2, DOCUMENTS + 1).astype("<i8").tofile(offsets)
    manifest = json.loads((folder / "manifest.json").read_text())
    for file in (tokens, offsets):
        manifest["files"][file.name]["bytes"] = file.stat().st_size
    manifest["figures"]["train"] |= {"documents": DOCUMENTS, "tokens": SIZE // 2}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def bytes_read() -> int:
    """By this process so far, through calls."""
    return int(Path("/proc/self/io").read_text().split()[1])


def bytes_mapped(name: str) -> int:
    """Of files of this name, those that this process has touched through memory maps."""
    held, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(name)
        elif inside and line.startswith("Rss:"):
            held += int(line.split()[1]) * 1024
    return held


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_first_step_comes_before_the_data_is_read(huge, tiny, tmp_path, monkeypatch):
    seen, submit, before = [], TrainEngine.submit, bytes_read()

    def first(self, *args, **kwargs):
        seen.append((bytes_read() - before, bytes_mapped("train-00000.tokens")))
        return submit(self, *args, **kwargs)

    monkeypatch.setattr(TrainEngine, "submit", first)
    recipe = tiny(
        data={"path": str(huge)}, train={"steps": 1, "seq_len": 1024, "batch_size": 2}, model={"context": 1024}
    )
    pretrain(recipe, tmp_path / "run")
    (read, mapped) = seen[0]
    assert 0 < mapped < 2**24 and read < 2**28  # pages and their neighbours; modules that are imported on the way


def test_verifying_hashes_every_file(tiny, shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "edited")
    tokens = folder / "train-00000.tokens"
    data = bytearray(tokens.read_bytes())
    data[len(data) // 2] ^= 1
    tokens.write_bytes(data)
    pretrain(tiny(data={"path": str(folder)}, train={"steps": 1}), tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"the content of train-00000\.tokens does not match"):
        pretrain(tiny(data={"path": str(folder), "verify": True}), tmp_path / "other")
