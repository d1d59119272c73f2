"""Fits a form of the loss to runs: Huber loss on log-losses, BFGS from several starts, intervals by bootstrap.

Hoffmann et al. 2022, section 3.3 (equation 3), with the sum instead of the mean of the Huber losses: BFGS stops too early on
a mean of order 1e-6 (Besiroglu et al. 2024, Chinchilla Scaling: A replication attempt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from luban.core.errors import DataError, MissingExtra
from luban.scaling.observations import Observations

DELTA = 1e-3  # where Huber's loss turns from squares to absolute values, in nats of log-loss
SCALE = 1e3  # of the objective: the gradient's tolerance then is relative to losses of order 1
OUTLIER = 10.0  # robust standard deviations
SMALLEST_OUTLIER = 0.02  # log-loss
LARGEST_SHARE = 0.1  # of the runs that may be outliers


class Form(Protocol):
    """A parametric form of log-loss. Its parameters refer to log N and log D less their means, which separates slopes from
    offsets."""

    @property
    def starts(self) -> Sequence[tuple[float, ...]]:
        """Where the search begins."""
        ...

    def log_loss(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log-losses, shape (runs,), and their derivatives by theta, shape (len(theta), runs)."""
        ...


def centres(runs: Observations) -> tuple[float, float]:
    """Means of log N and log D."""
    return float(np.log(runs.parameters).mean()), float(np.log(runs.tokens).mean())


def fit(
    form: Form,
    runs: Observations,
    *,
    delta: float = DELTA,
    weights: np.ndarray | None = None,
    start: np.ndarray | None = None,
) -> np.ndarray:
    """The parameters of `form` with the least sum of Huber losses.

    Args:
        weights: of the runs, shape (runs,).
        start: the one start to use; None: all of the form's.

    Raises:
        DataError: fewer runs, sizes or amounts of tokens than the form can be fitted to.
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise MissingExtra("scipy", "scaling", "a fit of scaling laws") from None
    _check(form, runs)
    mean_n, mean_d = centres(runs)
    n, d, target = np.log(runs.parameters) - mean_n, np.log(runs.tokens) - mean_d, np.log(runs.loss)
    weight = np.ones(len(runs)) if weights is None else weights

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        predicted, slopes = form.log_loss(theta, n, d)
        residual = predicted - target
        size = np.abs(residual)
        huber = np.where(size <= delta, 0.5 * residual**2, delta * (size - 0.5 * delta))
        return SCALE * float(weight @ huber), SCALE * (slopes @ (weight * np.clip(residual, -delta, delta)))

    with np.errstate(over="ignore", invalid="ignore"):
        tried = [
            minimize(objective, first, jac=True, method="BFGS", options={"gtol": 1e-6, "maxiter": 2000})
            for first in (form.starts if start is None else [start])
        ]
    good = [result for result in tried if np.isfinite(result.fun)]
    if not good:
        raise DataError("no start of the fit led to finite losses: the runs don't follow this form")
    return min(good, key=lambda result: result.fun).x


def _check(form: Form, runs: Observations) -> None:
    needed = len(form.starts[0])
    sizes, amounts = len(np.unique(runs.parameters)), len(np.unique(runs.tokens))
    if len(runs) < needed or sizes < 3 or amounts < 3:
        raise DataError(
            f"a fit of {needed} parameters needs at least {needed} runs with 3 different sizes and 3 different amounts of "
            f"tokens; there are {len(runs)} runs with {sizes} and {amounts}"
        )


def without_outliers(form: Form, runs: Observations, *, delta: float = DELTA) -> np.ndarray:
    """Mask of the runs, shape (runs,), whose log-loss is within ten robust standard deviations of the fit to these runs:
    runs that diverged, or whose schedule had not ended, would move the fit."""
    kept, theta = np.ones(len(runs), dtype=bool), None
    for _ in range(5):
        theta = fit(form, runs[kept], delta=delta, start=theta)
        mean_n, mean_d = centres(runs[kept])
        predicted, _ = form.log_loss(theta, np.log(runs.parameters) - mean_n, np.log(runs.tokens) - mean_d)
        off = np.abs(predicted - np.log(runs.loss))
        limit = max(OUTLIER * 1.4826 * float(np.median(off[kept])), SMALLEST_OUTLIER)
        worst = np.sort(off)[::-1][: int(LARGEST_SHARE * len(runs)) + 1]
        now = off <= max(limit, float(worst[-1]))
        if (now == kept).all():
            break
        kept = now
    return kept


def bootstrap(
    form: Form,
    runs: Observations,
    theta: np.ndarray,
    *,
    resamples: int,
    seed: int,
    delta: float = DELTA,
) -> np.ndarray:
    """Fits to `resamples` samples of the runs drawn with replacement, each from `theta`: shape (resamples, len(theta))."""
    random, fits = np.random.default_rng(seed), []
    share = np.full(len(runs), 1 / len(runs))
    while len(fits) < resamples:
        weights = random.multinomial(len(runs), share).astype(np.float64)
        fits.append(fit(form, runs, delta=delta, weights=weights, start=theta))
    return np.array(fits)
