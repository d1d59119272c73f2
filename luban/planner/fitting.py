"""Settings with which a run that needs too much memory would fit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt

from luban.core.plan import POLICIES, Remat
from luban.core.units import bytes_


@dataclass(frozen=True)
class BatchPlan:
    """Settings of a run that can be changed to save memory."""

    batch_size: int  # sequences an optimizer step
    accumulate: int  # micro-batches that they are cut into
    remat: Remat


@dataclass(frozen=True)
class Fitting:
    """Searches plans by their predicted memory.

    Args:
        plan: the one that doesn't fit.
        memory: plan → bytes at the peak of its step.
        available: bytes.
    """

    plan: BatchPlan
    memory: Callable[[BatchPlan], int]
    available: float

    def remedies(self) -> list[str]:
        """Command-line options that would make the run fit, each with what it needs; empty: nothing does."""
        return [*self._smaller_batches(), *self._stronger_remat()]

    def _fits(self, plan: BatchPlan) -> bool:
        return self.memory(plan) <= self.available

    def _smaller_batches(self) -> list[str]:
        """The fewest micro-batches, and the largest batch without more of them, that fit."""
        batch, accumulate = self.plan.batch_size, self.plan.accumulate
        remedies = []
        small = [n for n in range(1, isqrt(batch) + 1) if batch % n == 0]
        more = [
            replace(self.plan, accumulate=n) for n in sorted({*small, *(batch // n for n in small)}) if n > accumulate
        ]
        first = bisect_left(more, True, key=self._fits)
        if first < len(more):
            needed = bytes_(self.memory(more[first]))
            remedies.append(f"--train.accumulate {more[first].accumulate} would need {needed}")
        if largest := self._largest_batch(self.plan):
            remedies.append(f"--train.batch_size {largest} is the largest that fits")
        return remedies

    def _largest_batch(self, plan: BatchPlan) -> int:
        """The largest batch size below the plan's that fits; 0: none does. Memory grows almost linearly with it, so that a line
        through two sizes finds it in few predictions (regula falsi; the middle where the line leads nowhere)."""

        def needed(rows: int) -> int:
            return self.memory(replace(plan, batch_size=rows * plan.accumulate))

        fits, fails = 1, plan.batch_size // plan.accumulate  # rows of a micro-batch
        if fails <= fits or (low := needed(fits)) > self.available:
            return 0
        high, guesses = needed(fails), 0
        while fails - fits > 1:
            on_line = fits + int((self.available - low) * (fails - fits) / max(high - low, 1))
            middle = (fits + fails) // 2 if guesses % 3 == 2 else min(max(on_line, fits + 1), fails - 1)
            guesses += 1
            if (found := needed(middle)) <= self.available:
                fits, low = middle, found
            else:
                fails, high = middle, found
        return fits * plan.accumulate

    def _stronger_remat(self) -> list[str]:
        """Memory needed with each stronger policy or, if it doesn't fit, the largest batch with it."""
        remedies = []
        weaker = POLICIES.index(self.plan.remat) + 1 if self.plan.remat in POLICIES else len(POLICIES) - 1
        for policy in POLICIES[weaker:]:
            plan = replace(self.plan, remat=policy)  # type: ignore[arg-type]
            if self._fits(plan):
                remedies.append(f"--plan.remat {policy} would need {bytes_(self.memory(plan))}")
            elif largest := self._largest_batch(plan):
                remedies.append(f"--plan.remat {policy} --train.batch_size {largest} is the largest that fits with it")
        return remedies
