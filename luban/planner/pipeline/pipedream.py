"""PipeDream (Narayanan et al. 2019): 1F1B in which every micro-batch is a batch of its own, whose weights are updated right
after its backward pass. No process waits for a flush between updates; in exchange each backward pass uses the weights that
its forward pass has seen, of which a process has up to P − p versions, the newest among them."""

from __future__ import annotations

from luban.core.pipeline_order import Table, one_forward_one_backward


def pipedream(processes: int, micro_batches: int) -> Table:
    """One stage a process."""
    return [one_forward_one_backward(p, micro_batches, processes - p - 1) for p in range(processes)]


def staleness(processes: int, process: int, micro_batch: int) -> int:
    """How many updates the weights that a micro-batch meets in a process are behind those of a run without pipeline."""
    return min(processes - process - 1, micro_batch)
