"""Zero bubble (Qi et al. 2024, section 2.3.1, ZB-H1): the backward pass is split into the gradients of a stage's input,
which the process before waits for, and those of its weights, which fill the gaps. As much memory as 1F1B's first process
needs, in every process; a third of its bubble."""

from __future__ import annotations

from luban.core.pipeline_order import Action, Table, one_forward_one_backward


def zero_bubble(processes: int, micro_batches: int) -> Table:
    """1F1B, one stage a process, in which process p computes weight gradients p micro-batches behind input gradients."""
    return [_lagging(process, processes, micro_batches) for process in range(processes)]


def _lagging(process: int, processes: int, micro_batches: int) -> list[Action]:
    actions = []
    for kind, stage, m in one_forward_one_backward(process, micro_batches, processes - process - 1):
        actions.append(Action("F" if kind == "F" else "I", stage, m))
        if kind == "B" and m >= process:
            actions.append(Action("W", stage, m - process))
    left = min(process, micro_batches)
    return actions + [Action("W", process, m) for m in range(micro_batches - left, micro_batches)]
