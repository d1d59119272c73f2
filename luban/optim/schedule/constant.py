"""The peak learning rate throughout, after warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from luban.optim.schedule.base import Schedule


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Warm-up, then 1."""

    decays = False

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0
