"""The micro-batch of a recipe: the largest that is predicted to fit, then measured steps decide among it and smaller ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from luban.core.errors import UnsupportedError
from luban.core.units import bytes_
from luban.parallel.memory_limits import is_out_of_memory
from luban.train.predict import Prediction, predict
from luban.train.recipe import Recipe
from luban.train.run import _sample, assemble, open_run

STEPS = 2  # measured, after one to warm up


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One number of micro-batches."""

    accumulate: int
    rows: int  # of a micro-batch
    predicted_bytes: int
    predicted_seconds: float
    fits: bool  # as predicted
    seconds: float | None = None  # of a step, measured; None: not tried, or out of memory


def tune(
    recipe: Recipe,
    *,
    trials: int = 2,
    measure: Callable[[Recipe], float | None] | None = None,
    say: Callable[[Trial], object] = lambda trial: None,
) -> list[Trial]:
    """Every number of micro-batches, the largest micro-batch first, with measured steps of the `trials` largest that fit.

    Args:
        measure: recipe → seconds of a step, None where memory doesn't suffice; by default two steps are run.
        say: called with each trial when it is known.

    Raises:
        UnsupportedError: nothing fits.
    """
    opened = open_run(recipe)
    recipe, shards, start, device = opened
    found, measured = [], 0
    for accumulate in (n for n in range(1, recipe.train.batch_size + 1) if recipe.train.batch_size % n == 0):
        changed = replace(recipe, train=replace(recipe.train, accumulate=accumulate))
        prediction = predict(changed, start.spec, device, partial(_sample, changed, shards))
        trial = _trial(changed, prediction)
        if trial.fits and measured < trials:
            seconds = (measure or partial(_measured, opened))(changed)
            trial = replace(trial, seconds=seconds, fits=seconds is not None)
            measured += trial.fits
        found.append(trial)
        say(trial)
        if measured == trials:
            break
    if not measured:
        least = min(found, key=lambda trial: trial.predicted_bytes)
        raise UnsupportedError(
            f"no micro-batch fits: one of {least.rows} rows would need {bytes_(least.predicted_bytes)}; use --plan.remat full, or "
            "--plan.offload cpu"
        )
    return found


def best(trials: list[Trial]) -> Trial:
    """The fastest that was measured."""
    return min((trial for trial in trials if trial.seconds is not None), key=lambda trial: trial.seconds or 0.0)


def _trial(recipe: Recipe, prediction: Prediction) -> Trial:
    return Trial(
        accumulate=recipe.train.accumulate,
        rows=recipe.train.batch_size // recipe.train.accumulate,
        predicted_bytes=prediction.memory.total,
        predicted_seconds=prediction.step.total,
        fits=prediction.memory.total <= prediction.available_bytes,
    )


def _measured(opened: tuple, recipe: Recipe) -> float | None:
    """Median seconds of a step; None: out of memory."""
    _, shards, start, device = opened
    times = []
    try:
        parts = assemble(recipe, shards, start, device)
        batches = parts.loader.iterate()
        for _ in range(1 + STEPS):
            batch = next(batches)
            began = time.perf_counter()
            parts.engine.step(batch, 0.0)
            times.append(time.perf_counter() - began)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return statistics.median(times[1:])
