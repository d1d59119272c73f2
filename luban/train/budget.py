"""A time budget becomes a number of steps, once, so that the schedule and every resume agree on it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

WARM = 1  # steps that compile or warm caches: paid from the budget, but not timed
TIMED = 20  # steps that are timed
FEWEST = 3  # that are, where the budget would end before
RESERVE = 0.05  # share of the budget left for checkpoints, validation and a machine that slows down


@dataclass
class StepCount:
    """Number of steps of a run: `wanted` until `fixed_at` steps are done, then `fixed`."""

    wanted: int  # the recipe's steps
    budget_seconds: float = 0.0  # 0: no budget
    fixed: int | None = None  # number of steps that fit the budget
    fixed_at: int = WARM + TIMED  # number of steps done when `fixed` was set
    times: list[float] = field(default_factory=list)  # seconds of each step so far
    earlier: list[list[int]] = field(default_factory=list)  # [fixed_at, fixed] of decisions that another one replaced

    def total(self, step: int) -> int:
        """The number of steps of the run, as known at step `step` (from 0)."""
        decided = [*self.earlier, [self.fixed_at, self.fixed]]
        return next((steps for at, steps in reversed(decided) if steps is not None and step >= at), self.wanted)

    def known(self, step: int) -> int | None:
        """`total`; None while the steps that fit the budget aren't known yet."""
        return None if self.budget_seconds and self.fixed is None else self.total(step)

    def fix(self, step: int, steps: int) -> None:
        """Set the number of steps to `steps`, as known from step `step` on."""
        if self.fixed is not None:
            self.earlier.append([self.fixed_at, self.fixed])
        self.fixed, self.fixed_at = steps, step

    def figures(self) -> dict[str, Any]:
        """The state that a resumed run needs."""
        return {"fixed": self.fixed, "fixed_at": self.fixed_at, "earlier": self.earlier}

    def record(self, step: int, seconds: float, elapsed: float, overhead: float = 0.0) -> bool:
        """Record that step `step` took `seconds`. Returns whether this fixed the number of steps.

        Args:
            elapsed: seconds since the run began, compilation included.
            overhead: average seconds per step of other work, such as validation.
        """
        if not self.budget_seconds or self.fixed is not None:
            return False
        self.times.append(seconds)
        timed = self.times[WARM:]
        each = statistics.median(timed) + overhead if timed else 0.0  # median: one slow step must not halve the run
        left = max(self.budget_seconds * (1 - RESERVE) - elapsed, 0.0)
        to_time = max(self.fixed_at - step - 1, 0 if timed else 1)
        if left and to_time and (len(timed) < FEWEST or to_time * each < left):
            return False
        self.fixed_at = step + 1
        self.fixed = min(self.wanted, self.fixed_at + (int(left / each) if left else 0))
        return True
