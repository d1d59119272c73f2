"""How many micro-batches' inputs the processes of a pipeline keep at once, in closed form; `Timeline.peak_stash` counts the same."""

from __future__ import annotations

from luban.core.plan import ParallelPlan


def peak_stash(plan: ParallelPlan, micro_batches: int) -> list[int]:
    """For each process the most inputs of its stages, of which the interleaved schedule has several."""
    processes = plan.pipeline
    if processes == 1:
        return [1]
    if plan.schedule == "gpipe":
        return [micro_batches] * processes
    if plan.schedule == "interleaved":
        most = plan.interleave * micro_batches
        return [min((processes - p - 1) * 2 + (plan.interleave - 1) * processes + 1, most) for p in range(processes)]
    if plan.schedule == "zero_bubble":
        return [min(processes, micro_batches)] * processes
    return [min(processes - p, micro_batches) for p in range(processes)]
