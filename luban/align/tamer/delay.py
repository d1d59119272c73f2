"""How long trainers take to say something, by which feedback is credited to steps (registry `delay`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant


@dataclass(frozen=True, kw_only=True)
class Delay(Variant):
    """Base config of how long a trainer takes to say something about a step (registry `delay`)."""

    registry: ClassVar[Registry] = Registry(
        "delay",
        {
            "uniform": "luban.align.tamer.delay:UniformDelay",
            "gamma": "luban.align.tamer.delay:GammaDelay",
            "none": "luban.align.tamer.delay:NoDelay",
        },
    )

    def cdf(self, seconds: float) -> float:
        """The probability that a delay is at most this."""
        raise NotImplementedError

    @property
    def longest(self) -> float:
        """Seconds after which (nearly) no feedback comes."""
        raise NotImplementedError

    def credit(self, start: float, end: float, time: float) -> float:
        """The probability that a feedback given at `time` is about the step from `start` to `end`, in seconds."""
        return self.cdf(time - start) - self.cdf(time - end)


@dataclass(frozen=True, kw_only=True)
class UniformDelay(Delay):
    """Any delay between two bounds is as probable as any other."""

    least: float = 0.2  # seconds
    most: float = 0.8  # seconds

    def __post_init__(self):
        if not 0 <= self.least < self.most:
            raise ConfigError(f"a delay's bounds are 0 <= least < most, {self.least} and {self.most} given")

    def cdf(self, seconds: float) -> float:
        """See `Delay`."""
        return min(1.0, max(0.0, (seconds - self.least) / (self.most - self.least)))

    @property
    def longest(self) -> float:
        """See `Delay`."""
        return self.most


@dataclass(frozen=True, kw_only=True)
class GammaDelay(Delay):
    """A gamma distribution with a whole shape, behind a least delay."""

    shape: int = 2
    scale: float = 0.15  # seconds
    least: float = 0.2  # seconds

    def __post_init__(self):
        if self.shape < 1 or self.scale <= 0 or self.least < 0:
            raise ConfigError("a gamma delay has shape at least 1, scale above 0 and least at least 0")

    def cdf(self, seconds: float) -> float:
        """1 - exp(-x) Σ xᵏ/k! over k below the shape, x the seconds beyond the least over the scale."""
        x = max(0.0, seconds - self.least) / self.scale
        return 1.0 - math.exp(-x) * sum(x**k / math.factorial(k) for k in range(self.shape))

    @property
    def longest(self) -> float:
        """Mean and five standard deviations."""
        return self.least + self.scale * (self.shape + 5 * math.sqrt(self.shape))


@dataclass(frozen=True, kw_only=True)
class NoDelay(Delay):
    """Feedback is about the step in which it is given: what learning without credit assignment amounts to."""

    def cdf(self, seconds: float) -> float:
        """See `Delay`."""
        return float(seconds >= 0)

    @property
    def longest(self) -> float:
        """See `Delay`."""
        return 0.0
