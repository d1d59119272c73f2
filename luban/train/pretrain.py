"""Pretraining: next-token prediction over packed documents."""

from __future__ import annotations

from pathlib import Path

from luban.train.recipe import Recipe
from luban.train.run import train


def pretrain(recipe: Recipe, out: Path, name: str = "pretrain") -> Path:
    """Train a model on shards of text. See `luban.train.run.train`."""
    return train(recipe, out, task="pretrain", name=name)
