"""A time budget becomes a number of steps, once, so that the schedule and every resume agree on it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

WARM = 1  # steps that compile or warm caches: paid from the budget, but not timed
TIMED = 20  # steps that are timed
RESERVE = 0.05  # share of the budget left for checkpoints, validation and a machine that slows down


@dataclass
class StepCount:
    """How many steps a run has. Until `fixed_at` steps are done it is `wanted`; from there on `fixed`."""

    wanted: int  # the recipe's steps
    budget_seconds: float = 0.0  # 0: no budget
    fixed: int | None = None  # the steps that fit the budget
    fixed_at: int = WARM + TIMED  # steps done when it was fixed
    times: list[float] = field(default_factory=list)  # seconds of each step so far
    earlier: list[list[int]] = field(default_factory=list)  # [fixed_at, fixed] of decisions that another one replaced

    def total(self, step: int) -> int:
        """The number of steps as step `step` (from 0) sees it."""
        decided = [*self.earlier, [self.fixed_at, self.fixed]]
        return next((steps for at, steps in reversed(decided) if steps is not None and step >= at), self.wanted)

    def fix(self, step: int, steps: int) -> None:
        """From `step` steps on the run has `steps`."""
        if self.fixed is not None:
            self.earlier.append([self.fixed_at, self.fixed])
        self.fixed, self.fixed_at = steps, step

    def figures(self) -> dict[str, Any]:
        """What a resumed run must know."""
        return {"fixed": self.fixed, "fixed_at": self.fixed_at, "earlier": self.earlier}

    def time(self, step: int, seconds: float, elapsed: float, overhead: float = 0.0) -> bool:
        """Record that step `step` took `seconds`. Returns whether this fixed the number of steps.

        Args:
            elapsed: seconds spent since the run began, compilation included.
            overhead: seconds of other work a step brings with it on average, such as validation.
        """
        if not self.budget_seconds or self.fixed is not None:
            return False
        self.times.append(seconds)
        if step + 1 < self.fixed_at or len(self.times) <= WARM:
            return False
        each = statistics.median(self.times[WARM:]) + overhead  # a busy moment must not halve the run
        left = max(self.budget_seconds * (1 - RESERVE) - elapsed, 0.0)
        self.fixed_at = step + 1
        self.fixed = min(self.wanted, self.fixed_at + int(left / each))
        return True
