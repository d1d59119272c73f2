"""Which stage of a pipeline has its hidden states from which other one.

A stage that goes on in a stack has them from the stage before. States of a stack that has ended (an encoder's) go straight from
the stage that made them to the stages that read them, past those in between (torchgpipe's portals, Kim et al. 2020, section 3.3),
and once to a process: of several stages in it the first receives them, and the later ones take them from there.

Departure: torchgpipe names skip connections one by one; here they follow from which stacks a stage has layers of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class StackPart:
    """What a stage has of one stack."""

    layers: tuple[int, ...]
    first: bool  # the stack begins here
    last: bool  # the stack ends here
    finished: bool  # in an earlier stage


def stage_parts(depths: Sequence[int], runs: Sequence[tuple[int, int]]) -> list[list[StackPart]]:
    """The parts of each stage.

    Args:
        depths: layers of each stack.
        runs: first layer of each stage and the one past its last, of all stacks' layers one after another.
    """
    found = []
    for begin, end in runs:
        parts, before = [], 0
        for depth in depths:
            layers = tuple(range(max(begin - before, 0), min(max(end - before, 0), depth)))
            parts.append(StackPart(layers, 0 in layers, depth - 1 in layers, begin >= before + depth))
            before += depth
        found.append(parts)
    return found


@dataclass(frozen=True)
class Routes:
    """The ways of hidden states through a pipeline; gradients go the same ways back.

    Args:
        parts: of each stage, its part of each stack.
        pipeline: processes; stage s lies in process s mod `pipeline`.
    """

    parts: Sequence[Sequence[StackPart]]
    pipeline: int

    @cached_property
    def sources(self) -> list[dict[int, int]]:
        """Of each stage: stack → the stage that it has this stack's hidden states from."""
        found = []
        for stage, parts in enumerate(self.parts):
            row = {}
            for stack, part in enumerate(parts):
                if part.finished:  # and read here, as every stage has layers, which are of a later stack
                    maker = next(s for s, earlier in enumerate(self.parts) if earlier[stack].last)
                    row[stack] = next((s for s in range(maker, stage) if self.local(s, stage)), maker)
                elif part.layers and not part.first:
                    row[stack] = stage - 1
            found.append(row)
        return found

    @cached_property
    def readers(self) -> list[dict[int, list[int]]]:
        """Of each stage: stack → the stages that have this stack's hidden states from it."""
        found: list[dict[int, list[int]]] = [{} for _ in self.parts]
        for stage, row in enumerate(self.sources):
            for stack, source in row.items():
                found[source].setdefault(stack, []).append(stage)
        return found

    def local(self, source: int, target: int) -> bool:
        """Whether two stages lie in one process, so that nothing is sent."""
        return source % self.pipeline == target % self.pipeline

    @cached_property
    def messages(self) -> list[tuple[int, int, int]]:
        """(stack, source, target) of every message of a micro-batch's forward pass; the backward pass has them back."""
        return [
            (stack, source, stage)
            for stage, row in enumerate(self.sources)
            for stack, source in row.items()
            if not self.local(source, stage)
        ]
