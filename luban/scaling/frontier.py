"""How the best size grows with compute, without a form of the loss: Hoffmann et al. 2022, approaches 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.core.errors import DataError
from luban.scaling.observations import Observations

SAME_BUDGET = 1.1  # runs whose FLOPs differ by less than this factor have the same budget
LEAST = 4  # runs of a profile, for a parabola and a residual


@dataclass(frozen=True)
class PowerLaw:
    """N = factor · C^a; D = C/(6·N), thus D ∝ C^(1−a)."""

    a: float
    factor: float
    flops: tuple[float, ...]  # budgets that it is fitted to
    parameters: tuple[float, ...]  # the best size at each

    def size(self, flops: float) -> float:
        """Parameters of the best model for a budget."""
        return self.factor * flops**self.a


def envelope(runs: Observations) -> PowerLaw:
    """Approach 1: the runs that no run with as much compute or less beats.

    Raises:
        DataError: there are fewer than three.
    """
    flops, front = runs.flops, []
    best, budget, in_budget = np.inf, 0.0, False
    for index in np.argsort(flops, kind="stable"):
        if flops[index] > SAME_BUDGET * budget:
            budget, in_budget = flops[index], False
        if runs.loss[index] < best:
            best = runs.loss[index]
            if in_budget:  # beaten by one with as much compute
                front.pop()
            front.append(index)
            in_budget = True
    return _power_law(runs.flops[front], runs.parameters[front], "runs on the lower envelope of loss against FLOPs")


def isoflop(runs: Observations) -> PowerLaw:
    """Approach 2: the minimum of a parabola in log N through each group of runs with the same compute.

    Raises:
        DataError: fewer than three groups have a minimum between their sizes.
    """
    order = np.argsort(runs.flops)
    ordered = runs[order]
    cuts = np.flatnonzero(np.diff(np.log(ordered.flops)) > np.log(SAME_BUDGET)) + 1
    budgets, sizes = [], []
    for group in np.split(np.arange(len(ordered)), cuts):
        found = _minimum(np.log(ordered.parameters[group]), ordered.loss[group])
        if found is not None:
            budgets.append(float(np.exp(np.log(ordered.flops[group]).mean())))
            sizes.append(float(np.exp(found)))
    return _power_law(np.array(budgets), np.array(sizes), "IsoFLOP profiles with a minimum between their sizes")


def _minimum(log_n: np.ndarray, loss: np.ndarray) -> float | None:
    """Where the parabola through a profile is lowest; None: it has no minimum between the sizes."""
    if len(np.unique(log_n)) < LEAST:
        return None
    centre = log_n.mean()
    curvature, slope, _ = np.polyfit(log_n - centre, loss, 2)
    lowest = centre - slope / (2 * curvature) if curvature > 0 else np.inf
    return float(lowest) if log_n.min() < lowest < log_n.max() else None


def _power_law(flops: np.ndarray, parameters: np.ndarray, what: str) -> PowerLaw:
    if len(np.unique(flops)) < 3:
        raise DataError(f"{len(flops)} {what}: three are needed")
    a, intercept = np.polyfit(np.log(flops), np.log(parameters), 1)
    return PowerLaw(float(a), float(np.exp(intercept)), tuple(map(float, flops)), tuple(map(float, parameters)))
