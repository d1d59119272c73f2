"""Interleaved 1F1B (Narayanan et al. 2021, section 2.2): every process has v stages, which divides the bubble by v for v
times the communication: (P − 1)/(v·M) of the ideal time."""

from __future__ import annotations

from luban.core.errors import ConfigError
from luban.core.pipeline_order import Action, Table


def interleaved(processes: int, micro_batches: int, stages_each: int) -> Table:
    """v = `stages_each` stages a process. Raises ConfigError unless P divides the micro-batches."""
    if micro_batches % processes:
        raise ConfigError(f"interleaved stages take micro-batches {processes} at a time, and there are {micro_batches}")
    total = micro_batches * stages_each

    def at(process: int, place: int, *, forward: bool) -> Action:
        """The `place`-th forward or backward of a process: P micro-batches through each of its stages in turn."""
        group, within = divmod(place, processes * stages_each)
        turn = within // processes
        turn = turn if forward else stages_each - 1 - turn
        stage, micro_batch = turn * processes + process, group * processes + within % processes
        return Action("F" if forward else "B", stage, micro_batch)

    table = []
    for process in range(processes):
        warmup = min((processes - process - 1) * 2 + (stages_each - 1) * processes, total)
        actions = [at(process, n, forward=True) for n in range(warmup)]
        for n in range(warmup, total):
            actions += [at(process, n, forward=True), at(process, n - warmup, forward=False)]
        table.append(actions + [at(process, n, forward=False) for n in range(total - warmup, total)])
    return table
