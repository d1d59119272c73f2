"""Parallel plans as data: what divides the processes, and what is refused."""

from __future__ import annotations

import pytest

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan


def test_a_plan_that_does_not_fit_is_refused_with_one_that_does():
    assert ParallelPlan().over(4) == ParallelPlan(replicate=4)
    assert ParallelPlan(shard=4, replicate=2).over(8).processes == 8
    with pytest.raises(
        ConfigError, match=r"needs 3 processes, and there are 4: start 3 \(--nproc 3\), or give .*shard 4"
    ):
        ParallelPlan(shard=3).over(4)
    ParallelPlan(shard=2).check_batch(8, 4)
    with pytest.raises(ConfigError, match="must be a multiple of 8, such as 8"):
        ParallelPlan(shard=2, replicate=2).check_batch(6, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        ParallelPlan(shard=0)
