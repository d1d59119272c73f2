"""GPipe (Huang et al. 2019): all forwards, then all backwards. Bubble (P − 1)/M of the ideal time; stashes M inputs."""

from __future__ import annotations

from luban.core.pipeline_order import Action, Table


def gpipe(processes: int, micro_batches: int) -> Table:
    """One stage a process."""
    return [
        [Action(kind, process, m) for kind in ("F", "B") for m in range(micro_batches)] for process in range(processes)
    ]
