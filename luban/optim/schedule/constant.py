"""The peak learning rate throughout, after warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from luban.optim.schedule.base import Schedule


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Warm-up, then 1."""

    final: float = 1.0  # factor at the last step: always 1 here

    def __post_init__(self):
        super().__post_init__()
        if self.final != 1:
            raise ValueError(f"a constant schedule ends at 1, final = {self.final} given")

    def after_warmup(self, step: int, steps: int) -> float:
        return 1.0
