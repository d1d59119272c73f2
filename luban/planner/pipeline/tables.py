"""The table of a plan."""

from __future__ import annotations

from luban.core.pipeline_order import Table
from luban.core.plan import ParallelPlan
from luban.planner.pipeline.gpipe import gpipe
from luban.planner.pipeline.interleaved import interleaved
from luban.planner.pipeline.one_forward_one_backward import flushed
from luban.planner.pipeline.pipedream import pipedream
from luban.planner.pipeline.zero_bubble import zero_bubble

SINGLE = {"gpipe": gpipe, "1f1b": flushed, "zero_bubble": zero_bubble, "pipedream": pipedream}


def table_of(plan: ParallelPlan, micro_batches: int) -> Table:
    """The schedule of the plan for so many micro-batches."""
    if plan.schedule == "interleaved":
        return interleaved(plan.pipeline, micro_batches, plan.interleave)
    return SINGLE[plan.schedule](plan.pipeline, micro_batches)
