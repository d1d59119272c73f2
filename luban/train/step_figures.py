"""How fast the steps of a run were."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def step_figures(step_seconds: Sequence[float], waited: float, figures: Mapping[str, Any]) -> dict[str, float]:
    """Median step time in seconds, fraction of time spent waiting for data, and model FLOPs utilisation (MFU).

    Args:
        step_seconds: of every step since the start or the last resume; the first, which compiles, is left out.
        waited: seconds spent waiting for data after the first step.
        figures: of the run, with its FLOPs and the accelerator's peak where they are known.
    """
    steady = step_seconds[1:]
    if not steady:
        return {}
    step = statistics.median(steady)
    found = {"step_seconds": step, "data_wait": waited / max(sum(steady), 1e-9)}
    if "peak_flops" in figures:
        found["utilisation"] = figures["model_flops_per_step"] / step / figures["peak_flops"]
    return found
