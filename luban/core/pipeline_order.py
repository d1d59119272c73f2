"""What a schedule is: for every process the order of its work.

P processes, S = P·v stages (stage s lies in process s mod P), M micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

# forward; backward; of a split backward: gradients of the stage's input, gradients of its weights
Kind = Literal["F", "B", "I", "W"]


class Action(NamedTuple):
    """One piece of work of a process."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}"


Table = Sequence[Sequence[Action]]  # the actions of each process, in order


def one_forward_one_backward(process: int, micro_batches: int, warmup: int) -> list[Action]:
    """A process of one stage: `warmup` forwards, then a forward and a backward in turn, then the backwards that are left."""
    warmup = min(warmup, micro_batches)
    found = [Action("F", process, m) for m in range(warmup)]
    for m in range(warmup, micro_batches):
        found += [Action("F", process, m), Action("B", process, m - warmup)]
    return found + [Action("B", process, m) for m in range(micro_batches - warmup, micro_batches)]
