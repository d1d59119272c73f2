"""Cosine decay (Loshchilov & Hutter 2017, "SGDR", equation 5, one period)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from luban.optim.schedule.base import Schedule


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine from the peak, reached at the end of warm-up, to `final` at the last step."""

    final: float = 0.1  # factor at the last step

    def __post_init__(self):
        super().__post_init__()
        self.check_final(self.final)

    def after_warmup(self, step: int, steps: int) -> float:
        share = self.decayed(step, max(self.warmup - 1, 0), steps)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * share))
