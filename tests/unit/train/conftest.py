"""Shards and a recipe small enough to train in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_data import make_shards

from luban.core.config import from_dict, merge
from luban.train.recipe import Recipe

TINY = {
    "model": {
        "width": 32,
        "layers": 2,
        "context": 64,
        "tied_head": True,
        "layer": {"mixer": {"heads": 2, "kv_heads": 1}, "feedforward": {"width": 48}},
    },
    "schedule": {"warmup": 2},
    "train": {"steps": 6, "batch_size": 4, "seq_len": 32, "device": "cpu", "log_every": 1},
    "checkpoint": {"every": 2},
    "validation": {"every": 2, "batches": 1},
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny(shards):
    """`tiny(train={…})` is a recipe with these sections changed."""

    def make(**sections) -> Recipe:
        return from_dict(Recipe, merge({**TINY, "data": {"path": str(shards)}}, sections))

    return make


@pytest.fixture(autouse=True)
def leave_torch_as_it_was():
    yield
    torch.use_deterministic_algorithms(False)
