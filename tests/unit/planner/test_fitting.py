"""What is advised where a run doesn't fit, against a search of everything."""

from __future__ import annotations

import random
import re

import pytest

from luban.planner.fitting import BatchPlan, Fitting

COST = {"none": 10, "selective": 6, "full": 2}


@pytest.mark.parametrize("_", range(20))
def test_remedies_are_the_largest_that_fit(_):
    fixed, batch = random.randint(0, 50), random.choice([12, 30, 64])

    def memory(plan: BatchPlan) -> int:
        return fixed + COST[plan.remat] * (plan.batch_size // plan.accumulate)

    plan = BatchPlan(batch, random.choice([n for n in (1, 2, 3, 6) if batch % n == 0]), "none")
    available = random.randint(0, memory(plan) - 1)
    found = "; ".join(Fitting(plan, memory, available).remedies())

    def largest(remat: str) -> int:
        fits = [n for n in range(1, batch // plan.accumulate) if fixed + COST[remat] * n <= available]
        return max(fits, default=0) * plan.accumulate

    finer = [n for n in range(plan.accumulate + 1, batch + 1) if batch % n == 0]
    first = next((n for n in finer if fixed + 10 * (batch // n) <= available), None)
    assert re.findall(r"--train.accumulate (\d+)", found) == ([str(first)] if first else [])
    alone = re.findall(r"(?:^|; )--train.batch_size (\d+)", found)
    assert alone == ([str(largest("none"))] if largest("none") else [])
    for remat in ("selective", "full"):
        needed = fixed + COST[remat] * (batch // plan.accumulate)
        with_batch = re.findall(rf"--plan.remat {remat} --train.batch_size (\d+)", found)
        assert (f"--plan.remat {remat} would need {needed} B" in found) == (needed <= available)
        assert with_batch == ([] if needed <= available or not largest(remat) else [str(largest(remat))])
