"""What every kind of tuning does first: load the model and its tokenizer, pack the data beside the run."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from luban.core.errors import LubanError, TrainingError, UsageError
from luban.core.whole_directory import real_path
from luban.load.model import LoadedModel, load_model
from luban.parallel.world import process_count
from luban.train.interrupt import Interrupted
from luban.train.recipe import Recipe
from luban.train.start import require_adaptable

T = TypeVar("T")


def model_of(recipe: Recipe, what: str, data: str) -> LoadedModel:
    """The model of `recipe.init`.

    Raises:
        UsageError: the recipe names no model or no data.
        ConfigError, UnsupportedError: its adapter doesn't go with the model.
    """
    if not recipe.init:
        raise UsageError(f"{what} needs a model to start from: give --init MODEL")
    if not recipe.data.path:
        raise UsageError(f"no data to train on: give --data.path {data}")
    model = load_model(recipe.init)
    model.need_tokenizer()
    require_adaptable(recipe, model)
    return model


def cache_of(out: Path) -> Path:
    """The folder of what is packed for the run `out`: OUT.data."""
    place = out if out.is_symlink() else real_path(out)
    return place.with_name(place.name + ".data")


@contextmanager
def packed_beside(out: Path) -> Iterator[Path]:
    """The folder for what is packed for the run `out`; what is new in it is removed where the run is then refused."""
    cache = cache_of(out)
    before = set(cache.iterdir()) if cache.is_dir() else set()
    try:
        yield cache
    except (TrainingError, Interrupted):
        raise  # the run goes on from what was packed
    except LubanError:
        for entry in set(cache.iterdir()) - before if cache.is_dir() else ():
            shutil.rmtree(entry)
        if cache.is_dir() and not before:
            cache.rmdir()
        raise


def one_after_another(cache: Path, make: Callable[[], T]) -> T:
    """`make()`, by one process of a run after the other: the first makes what the others find."""
    if process_count() == 1:
        return make()
    cache.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(cache.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return make()
    finally:
        os.close(lock)
