"""Every file that Luban writes has the permissions that the umask gives to new files."""

from __future__ import annotations

import os
import stat

import pytest
import torch
from training_data import make_shards

import luban
from luban.checkpoint.checkpoint import Checkpoint
from luban.checkpoint.saver import save_checkpoint
from luban.corpus.quality.linear import LinearModel
from luban.corpus.quality.ngram import NgramModel
from luban.load.export import import_model


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    """The process's umask, set for one test."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_have_the_permissions_that_the_umask_gives(tiny_checkpoint, tmp_path, umask):
    make_shards(tmp_path)  # a corpus, a tokenizer and shards
    NgramModel.train(["one two three four", "two three four five"]).save(tmp_path / "ngram")
    LinearModel.train(["good text"] * 4, ["other words"] * 4, seed=0).save(tmp_path / "linear", (), 0)
    tensors = {"w": torch.randn(3)}
    checkpoint = Checkpoint(spec={}, model=tensors, optimizer=tensors, random=tensors, state={})
    save_checkpoint(tmp_path / "checkpoint", checkpoint)
    model = luban.load_model(tiny_checkpoint)
    luban.export_model(model, tmp_path / "exported")
    import_model(model, tmp_path / "imported")
    written = list(tmp_path.rglob("*"))
    assert len([path for path in written if path.suffix == ".safetensors"]) >= 5
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path in written
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert not wrong
