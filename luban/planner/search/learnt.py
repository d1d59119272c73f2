"""How far predictions are off, learnt from the predictions and measurements that finished runs left in their manifests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path
from statistics import fmean

from luban.core.errors import DataError
from luban.planner.accelerators import Accelerator

# 95% quantiles of Student's t, two-sided, by degrees of freedom; beyond the last: 1.96
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)

NORMAL = 1.96  # the same of a normal distribution
PRIOR = 2  # runs that a table's own estimate of its error counts as


@dataclass(frozen=True, kw_only=True)
class Error:
    """What a predicted time is multiplied by, and the interval that holds 95% of the measured ones."""

    factor: float
    interval: tuple[float, float]  # factors on the prediction
    runs: int  # that say so; 0: the table does

    def __str__(self) -> str:
        low, high = (value / self.factor - 1 for value in self.interval)
        if not self.runs:
            return f"± {high:.0%}, by the table's own estimate"
        return f"{low:+.0%} to {high:+.0%}, learnt from {self.runs} runs, whose steps took {self.factor:.2f} of their predictions"


def learnt(runs: Sequence[Path], assumed: float, gpu: Accelerator) -> Error:
    """The error by these runs; without any, the assumed relative error.

    Raises:
        DataError: a directory isn't a run with both figures, or the run was on another device than `gpu`.
    """
    return error_of([_ratio(run, gpu) for run in runs], assumed)


def error_of(ratios: Sequence[float], assumed: float) -> Error:
    """By ratios of measured to predicted time: a log-normal prediction interval for one more run. The assumed error counts as
    PRIOR runs, so that few runs don't make it absurdly wide or narrow."""
    if not ratios:
        return Error(factor=1.0, interval=(1 / (1 + assumed), 1 + assumed), runs=0)
    logs = [log(ratio) for ratio in ratios]
    middle, freedom = fmean(logs), len(logs) - 1 + PRIOR
    spread = PRIOR * (log(1 + assumed) / NORMAL) ** 2 + sum((each - middle) ** 2 for each in logs)
    quantile = QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else NORMAL
    wide = quantile * sqrt(spread / freedom * (1 + 1 / len(logs)))
    return Error(factor=exp(middle), interval=(exp(middle - wide), exp(middle + wide)), runs=len(ratios))


def _ratio(run: Path, gpu: Accelerator) -> float:
    try:
        figures = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["figures"]
        if (device := figures["accelerator"]) not in gpu.names:
            raise DataError(f"{run} ran on {device}, which says nothing of {gpu.names[0]}: leave it out of --runs")
        return float(figures["step_seconds"]) / float(figures["predicted_step_seconds"])
    except FileNotFoundError:
        raise DataError(f"{run} is no run: --runs takes finished runs of luban pretrain") from None
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise DataError(
            f"{run} has no predicted and measured step time: --runs takes finished runs of luban pretrain ({error})"
        ) from None
