"""Parallel plans as data: what divides the processes, and what is refused."""

from __future__ import annotations

import pytest

from luban.core.errors import ConfigError
from luban.core.plan import ParallelPlan


def test_a_plan_that_does_not_fit_is_refused_with_one_that_does():
    assert ParallelPlan().over(4) == ParallelPlan(replicate=4)
    assert ParallelPlan(shard=4, replicate=2).over(8).processes == 8
    for zero in (1, 2, 3):  # says that training state is to be divided
        assert ParallelPlan(zero=zero).over(4) == ParallelPlan(shard=4, zero=zero)
        assert ParallelPlan(zero=zero, tensor=2).over(4) == ParallelPlan(shard=2, tensor=2, zero=zero)
        ParallelPlan(zero=zero, tensor=2).check_used(4)
        with pytest.raises(ConfigError, match=f"plan.zero {zero} .* of 1 in all: start 2 .*--nproc 2"):
            ParallelPlan(zero=zero).check_used(1)
        with pytest.raises(ConfigError, match=f"plan.zero {zero} .* of 4 in all: start 8 .*--nproc 8"):
            ParallelPlan(zero=zero, pipeline=4).check_used(4)
    # what is asked of shards is asked once there are any
    assert ParallelPlan(zero=2, expert=4).over(4) == ParallelPlan(shard=4, zero=2, expert=4)
    with pytest.raises(ConfigError, match=r"plan.expert 4 must divide .* which is 2"):
        ParallelPlan(zero=2, expert=4).over(2)
    away = ParallelPlan(zero=2, context=2, offload="cpu")
    assert away.over(4) == ParallelPlan(shard=2, zero=2, context=2, offload="cpu")
    with pytest.raises(ConfigError, match=r"plan.zero 2 .* of 2 in all: start 4"):
        away.check_used(2)
    with pytest.raises(ConfigError, match=r"does not go with plan.context alone"):
        ParallelPlan(context=2, offload="cpu")
    assert ParallelPlan(shard=2).over(2).zero_stage == 3
    with pytest.raises(
        ConfigError, match=r"needs 3 processes, and there are 4: start 3 \(--nproc 3\), or give .*shard 4"
    ):
        ParallelPlan(shard=3).over(4)
    ParallelPlan(shard=2).check_batch(8, 4)
    with pytest.raises(ConfigError, match="must be a multiple of 8, such as 8"):
        ParallelPlan(shard=2, replicate=2).check_batch(6, 2)
    with pytest.raises(ConfigError, match="at least 1"):
        ParallelPlan(shard=0)


def test_a_field_that_would_change_nothing_is_refused():
    for fields, message in (
        ({"replicate": 2, "zero": 3}, r"plan.zero 3 .* plan.shard is 1: use --plan.shard N --plan.zero 3"),
        ({"replicate": 2, "zero": 2}, r"plan.zero 2 .* plan.shard is 1: use --plan.shard N --plan.zero 2"),
        ({"tensor": 2, "schedule": "gpipe"}, "plan.schedule gpipe is for pipelines, and plan.pipeline is 1"),
        ({"stage_layers": (4,)}, "plan.stage_layers is for pipelines"),
        ({"pipeline": 2, "interleave": 4}, "plan.interleave 4 is for another schedule than 1f1b"),
        (
            {"remat_budget": "1GB"},
            "plan.remat_budget 1GB is for rotor and pofo, and plan.remat is none: .*--plan.remat rotor",
        ),
        ({"remat": "sqrt", "remat_budget": "30%"}, "and plan.remat is sqrt"),
        ({"remat": "full", "remat_budget": "30%"}, "and plan.remat is full"),
        (
            {"offload": "cpu", "offload_folder": "/fast"},
            "plan.offload_folder /fast .*plan.offload is cpu: .*--plan.offload disk",
        ),
        ({"offload_folder": "/fast"}, "plan.offload is none"),
    ):
        with pytest.raises(ConfigError, match=message):
            ParallelPlan(**fields).check_used()
    for fields in (
        {"shard": 2, "zero": 1},
        {"pipeline": 2, "schedule": "gpipe", "stage_layers": (1, 3)},
        {"pipeline": 2, "schedule": "interleaved", "interleave": 4},
        {"remat": "rotor", "remat_budget": "30%"},
        {"remat": "pofo", "remat_budget": "2GB"},
        {"offload": "disk", "offload_folder": "/fast"},
        {},
    ):
        ParallelPlan(**fields).check_used()
