"""Base config of learning-rate schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from luban.core.registry import Registry, Variant


@dataclass(frozen=True, kw_only=True)
class Schedule(Variant):
    """A pure function (step, total steps) → factor in [0, 1] on the peak learning rate.

    Every schedule first rises linearly: step s of `warmup` steps has factor (s + 1) / warmup, so that the
    first step already moves and step `warmup - 1` is at the peak.
    """

    registry: ClassVar[Registry] = Registry(
        "schedule",
        {
            "cosine": "luban.optim.schedule.cosine:Cosine",
            "wsd": "luban.optim.schedule.wsd:WarmupStableDecay",
            "constant": "luban.optim.schedule.constant:Constant",
        },
    )

    decays: ClassVar[bool] = True  # falls after its peak

    warmup: int = 20  # steps of linear warm-up

    def __post_init__(self):
        if self.warmup < 0:
            raise ValueError(f"warmup must be at least 0 steps, {self.warmup} given")

    def factor(self, step: int, steps: int) -> float:
        """The factor for step `step` (from 0) of `steps`; steps past the end keep the last value."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.after_warmup(min(step, steps - 1), steps)

    def never_at_peak(self, steps: int) -> str:
        """A warning if a run of `steps` steps ends before its warm-up does; else empty."""
        if self.warmup <= steps:
            return ""
        return (
            f"schedule.warmup is {self.warmup} steps and the run has {steps}: the learning rate only rises, to "
            f"{self.factor(steps - 1, steps):.0%} of its peak"
        )

    def ends_early(self, step: int, steps: int) -> int:
        """How many steps a run of `steps` has if it is to end early, decided after `step` of them: at once."""
        return step

    def after_warmup(self, step: int, steps: int) -> float:
        """The factor once warm-up is over, `warmup <= step < steps`."""
        raise NotImplementedError

    def check_final(self, final: float) -> None:
        """Raise ValueError unless `final` is a factor that a schedule can end at."""
        if not 0 <= final <= 1:
            raise ValueError(f"final must lie in [0, 1], {final} given")

    def decayed(self, step: int, begin: int, steps: int) -> float:
        """How much of the decay from step `begin` to the last step lies behind `step`, in [0, 1]."""
        return min(max(step - begin, 0) / max(steps - 1 - begin, 1), 1.0)
