"""Spikes of the loss or of the gradient norm: found by their distance from the steps before, and passed by going back to the last
checkpoint and leaving out the batches up to the spike (Chowdhery et al. 2022, PaLM, section 5.1)."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

from luban.core.errors import ConfigError

MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation


@dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """What counts as a spike, and what is done."""

    action: Literal["off", "report", "skip"] = (
        "off"  # off; report: log and warn; skip: go back to the last checkpoint and leave batches out
    )
    sigmas: float = 8.0  # robust standard deviations above the median of the steps before that make a spike
    window: int = 64  # steps that a step is compared with, those that were spikes left out
    least: int = 16  # steps before which nothing is a spike
    beyond: int = 0  # batches left out behind the spike's
    cooling: float = 1.0  # factor on the learning rate after every time that training went back
    most: int = 10  # times that a run goes back; after that spikes are only reported

    def __post_init__(self):
        if not self.sigmas > 0 or not 0 < self.cooling <= 1:
            raise ConfigError(
                f"spikes need sigmas above 0 and a cooling in (0, 1]: {self.sigmas} and {self.cooling} given"
            )
        if self.least < 2 or self.window < self.least:
            raise ConfigError(
                f"spikes need a window of at least `least` steps, and that at least 2: {self.window}, {self.least}"
            )
        if min(self.beyond, self.most) < 0:
            raise ConfigError(f"spikes.beyond and spikes.most can't be negative: {self.beyond} and {self.most} given")


@dataclass(frozen=True)
class Spike:
    """A step that stands out."""

    what: str  # "loss" or "gradient norm"
    value: float
    median: float
    sigmas: float  # robust standard deviations above the median

    def __str__(self) -> str:
        return f"{self.what} {self.value:.4g}, {self.sigmas:.1f} deviations above {self.median:.4g}"


class SpikeDetector:
    """Compares every step's figures with those of the steps before. A deviation is never taken to be smaller than 1% of the
    median, so that a loss that hardly varies gives no spikes."""

    def __init__(self, config: SpikeConfig):
        self.config = config
        self.before: dict[str, deque[float]] = {}
        self.reset()

    def reset(self) -> None:
        """Forget the steps before, as after going back."""
        self.before = {what: deque(maxlen=self.config.window) for what in ("loss", "gradient norm")}

    def observe(self, loss: float, grad_norm: float) -> Spike | None:
        """The spike that this step is, the worse where both are; figures of a spike are not compared with later ones. Steps that
        are NaN or infinite are skipped by the trainer and none of these."""
        figures = {"loss": loss, "gradient norm": grad_norm}
        if not all(map(math.isfinite, figures.values())):
            return None
        spikes = [spike for what, value in figures.items() if (spike := self._spike(what, value))]
        if spikes:
            return max(spikes, key=lambda each: each.sigmas)
        for what, value in figures.items():
            self.before[what].append(value)
        return None

    def _spike(self, what: str, value: float) -> Spike | None:
        before = self.before[what]
        if len(before) < self.config.least:
            return None
        median = statistics.median(before)
        deviation = max(MAD * statistics.median(abs(each - median) for each in before), 0.01 * abs(median), 1e-12)
        sigmas = (value - median) / deviation
        return Spike(what, value, median, sigmas) if sigmas > self.config.sigmas else None
