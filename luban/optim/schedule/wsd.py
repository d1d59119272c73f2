"""Warm-up, stable, decay (Hu et al. 2024, "MiniCPM", section 4.2; linear decay as in Hägele et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from luban.optim.schedule.base import Schedule


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """The peak until the last `decay` share of the steps, then a straight line to `final`."""

    final: float = 0.0  # factor at the last step
    decay: float = 0.2  # share of all steps spent decaying

    def __post_init__(self):
        super().__post_init__()
        self.check_final(self.final)
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], {self.decay} given")

    def ends_early(self, step: int, steps: int) -> int:
        """The decay begins now, and keeps its share of all steps; where it has begun, it is completed."""
        return min(steps, max(round(step / (1 - self.decay)), step + 1)) if self.decay < 1 else steps

    def after_warmup(self, step: int, steps: int) -> float:
        begin = max(round(steps * (1 - self.decay)) - 1, self.warmup - 1, 0)
        return 1 - (1 - self.final) * self.decayed(step, begin, steps)
