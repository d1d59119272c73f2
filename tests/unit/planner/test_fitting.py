"""What is advised where a run doesn't fit, against a search of everything."""

from __future__ import annotations

import random
import re

import pytest

from luban.planner.fitting import BatchPlan, Fitting

COST = {"none": 10, "selective": 6, "full": 2}


@pytest.mark.parametrize("_", range(20))
def test_remedies_are_the_largest_that_fit(_):
    fixed, batch, jump, every = random.randint(0, 50), random.choice([12, 30, 64]), random.choice([0, 40]), 7

    def cost(remat: str, rows: int) -> int:
        return fixed + COST[remat] * rows + jump * (rows // every)

    def memory(plan: BatchPlan) -> int:
        return cost(plan.remat, plan.batch_size // plan.accumulate)

    plan = BatchPlan(batch, random.choice([n for n in (1, 2, 3, 6) if batch % n == 0]), "none")
    available = random.randint(0, memory(plan) - 1)
    found = "; ".join(Fitting(plan, memory, available).remedies())

    def largest(remat: str) -> int:
        fits = [n for n in range(1, batch // plan.accumulate) if cost(remat, n) <= available]
        return max(fits, default=0) * plan.accumulate

    finer = [n for n in range(plan.accumulate + 1, batch + 1) if batch % n == 0]
    first = next((n for n in finer if cost("none", batch // n) <= available), None)
    assert re.findall(r"--train.accumulate (\d+)", found) == ([str(first)] if first else [])
    alone = re.findall(r"(?:^|; )--train.batch_size (\d+)", found)
    assert alone == ([str(largest("none"))] if largest("none") else [])
    for remat in ("selective", "full"):
        needed = cost(remat, batch // plan.accumulate)
        with_batch = re.findall(rf"--plan.remat {remat} --train.batch_size (\d+)", found)
        assert (f"--plan.remat {remat} would need {needed} B" in found) == (needed <= available)
        assert with_batch == ([] if needed <= available or not largest(remat) else [str(largest(remat))])


def test_the_largest_batch_is_found_in_few_predictions():
    """Of memory that grows linearly: both ends, what the line says, and one row more."""
    asked: list[int] = []

    def memory(plan: BatchPlan) -> int:
        asked.append(plan.batch_size)
        return 1000 + 37 * plan.batch_size

    assert Fitting(BatchPlan(4096, 1, "none"), memory, 1000 + 37 * 1234 + 5)._largest_batch(
        BatchPlan(4096, 1, "none")
    ) == 1234 and sorted(asked) == [1, 1234, 1235, 4096]
