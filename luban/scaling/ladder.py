"""A ladder of models that grow together, extrapolated to the next size.

With tokens proportional to parameters, each rung is one run of a compute-optimal family, and its loss a power of compute: L = a·C^−γ
(Kaplan et al. 2020, equation 1.3, without an irreducible part, which a few small models can't tell from γ). A least-squares line
through the logarithms has a prediction interval by Student's t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, isfinite, log, sqrt

from luban.core.errors import DataError

# 95% quantiles of Student's t, two-sided, by degrees of freedom; beyond the last: 1.96
QUANTILES = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18)
LEAST = 3  # rungs of a line with an interval


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """L = factor · C^−exponent, with what a prediction interval needs."""

    factor: float
    exponent: float
    spread: float  # standard error of the regression, of log L
    middle: float  # mean of log C
    width: float  # sum of squares of log C around it
    points: int

    def loss(self, flops: float) -> float:
        """The loss that the line gives."""
        return self.factor * flops**-self.exponent

    def interval(self, flops: float) -> tuple[float, float]:
        """Holds 95% of further runs of this size, if the line is right."""
        freedom = self.points - 2
        quantile = QUANTILES[freedom - 1] if freedom <= len(QUANTILES) else 1.96
        away = (log(flops) - self.middle) ** 2 / self.width
        wide = quantile * self.spread * sqrt(1 + 1 / self.points + away)
        return self.loss(flops) * exp(-wide), self.loss(flops) * exp(wide)


def power_law(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """The line through the rungs.

    Raises:
        DataError: fewer than three different sizes, or a value that is no number above 0.
    """
    if len(set(flops)) < LEAST:
        raise DataError(f"a ladder needs {LEAST} sizes to be extrapolated, {len(set(flops))} given")
    if not all(isfinite(value) and value > 0 for value in (*flops, *losses)):
        raise DataError("FLOPs and losses of a ladder are numbers above 0")
    x, y = [log(value) for value in flops], [log(value) for value in losses]
    middle, height = sum(x) / len(x), sum(y) / len(y)
    width = sum((each - middle) ** 2 for each in x)
    slope = sum((a - middle) * (b - height) for a, b in zip(x, y, strict=True)) / width
    rest = sum((b - height - slope * (a - middle)) ** 2 for a, b in zip(x, y, strict=True))
    return PowerLaw(
        factor=exp(height - slope * middle),
        exponent=-slope,
        spread=sqrt(rest / (len(x) - 2)),
        middle=middle,
        width=width,
        points=len(x),
    )
