"""1F1B with a flush (Narayanan et al. 2021, PipeDream-Flush): bubble (P − 1)/M of the ideal time, like GPipe's, but
process p stashes at most P − p inputs."""

from __future__ import annotations

from luban.core.pipeline_order import Table, one_forward_one_backward


def flushed(processes: int, micro_batches: int) -> Table:
    """One stage a process."""
    return [one_forward_one_backward(p, micro_batches, processes - p - 1) for p in range(processes)]
