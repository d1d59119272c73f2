"""Win rates against a baseline, and what they would be at equal length (Dubois et al. 2024, "Length-Controlled AlpacaEval").

N comparisons, K features, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luban.core.metrics.bootstrap import interval, resamples

RIDGE = 1e-2  # of the regression, in comparisons: keeps coefficients finite where one side wins everything
STEPS, CLOSE = 50, 1e-7  # of Newton's method
RESAMPLES = 500


@dataclass(frozen=True, kw_only=True)
class WinRate:
    """How often a model's answers are preferred, ties as half."""

    value: float
    interval: tuple[float, float]  # bootstrap over comparisons, 95%
    n: int


def win_rate(scores: Sequence[float]) -> WinRate:
    """The mean of 1 (preferred), 0.5 (tie), 0. Raises ValueError for none."""
    low, high = interval(scores)
    return WinRate(value=float(np.mean(scores)), interval=(low, high), n=len(scores))


def length_controlled(
    scores: Sequence[float],
    lengths: Sequence[float],
    baseline_lengths: Sequence[float],
    difficulty: Sequence[float] | None = None,
) -> WinRate:
    """The win rate that the judge would give if both answers were equally long.

    A logistic regression explains preferences by the model (a constant), the length difference as tanh(Δ ÷ its standard
    deviation), and, where it is known, each instruction's difficulty; the rate is its mean prediction with Δ = 0. Departure
    from the paper: difficulties are given (`difficulties`), not fitted along with the leaderboard's other models here.

    Args:
        scores: 1, 0.5 or 0 for the model's answer. lengths: of its answers; baseline_lengths: of the others, in characters.
        difficulty: of each instruction, in log-odds for an average model.

    Raises ValueError for no comparisons.
    """
    y_N = np.asarray(scores, dtype=np.float64)
    if not len(y_N):
        raise ValueError("a win rate needs at least one comparison")
    gaps = np.asarray(lengths, dtype=np.float64) - np.asarray(baseline_lengths, dtype=np.float64)
    spread = float(gaps.std()) or 1.0
    columns = [np.ones_like(y_N), np.tanh(gaps / spread)]
    if difficulty is not None:
        columns.append(np.asarray(difficulty, dtype=np.float64))
    x_NK = np.stack(columns, 1)
    equal_NK = x_NK.copy()
    equal_NK[:, 1] = 0
    fitted_1K = logistic_regression(x_NK, y_N, np.ones((1, len(y_N))))
    value = _sigmoid(equal_NK @ fitted_1K[0]).mean()
    found = []
    for places in resamples(len(y_N), RESAMPLES):
        counts_RN = np.stack([np.bincount(row, minlength=len(y_N)) for row in places]).astype(np.float64)
        weights_RK = logistic_regression(x_NK, y_N, counts_RN, start=fitted_1K)
        found.append((counts_RN * _sigmoid(weights_RK @ equal_NK.T)).sum(1) / len(y_N))
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return WinRate(value=float(value), interval=(float(low), float(high)), n=len(y_N))


def logistic_regression(
    x_NK: np.ndarray,
    y_N: np.ndarray,
    counts_RN: np.ndarray,
    *,
    start: np.ndarray | None = None,
    ridge: float = RIDGE,
) -> np.ndarray:
    """(R, K) coefficients that make y, which may be fractions, likeliest, by Newton's method.

    Args:
        counts_RN: how often each comparison stands in each resample.
        start: (1, K) coefficients to begin with.
    """
    size = x_NK.shape[1]
    weights_RK = np.zeros((len(counts_RN), size)) if start is None else np.repeat(start, len(counts_RN), 0)
    products_NKK = x_NK[:, :, None] * x_NK[:, None, :]
    for _ in range(STEPS):
        chance_RN = _sigmoid(weights_RK @ x_NK.T)
        gradient_RK = (counts_RN * (y_N - chance_RN)) @ x_NK - ridge * weights_RK
        curvature_RN = counts_RN * chance_RN * (1 - chance_RN)
        hessian_RKK = (curvature_RN @ products_NKK.reshape(len(y_N), -1)).reshape(-1, size, size) + ridge * np.eye(size)
        step_RK = np.linalg.solve(hessian_RKK, gradient_RK[..., None])[..., 0]
        step_RK *= np.minimum(1, 2 / np.maximum(np.abs(step_RK).max(1, keepdims=True), 1e-12))
        weights_RK += step_RK
        if np.abs(step_RK).max() < CLOSE:
            break
    return weights_RK


def difficulties(scores: np.ndarray) -> np.ndarray:
    """(N,) log-odds that models' answers to each instruction are preferred to the baseline's.

    Args:
        scores: (models, N) of 1, 0.5, 0 or NaN; shrunk towards the models' mean by one comparison.
    """
    mean = np.nanmean(scores)
    count = np.sum(~np.isnan(scores), 0)
    rate = np.clip((np.nansum(scores, 0) + mean) / (count + 1), 1e-3, 1 - 1e-3)
    return np.log(rate / (1 - rate))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
