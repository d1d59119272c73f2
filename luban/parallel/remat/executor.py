"""Runs consecutive layers by a schedule: of the tensors that autograd would keep, those are kept that the schedule keeps, and the
others are computed again when the schedule says so.

There is one autograd graph, built by the first forward pass. Hooks on saved tensors leave a place number in it instead of a
tensor. When the backward pass of a layer asks for the first of its tensors, the schedule is carried out up to that point:
what earlier layers need is computed again from the inputs that were kept, on graphs that are dropped at once, and what they
save is put where the place numbers point. So gradients flow through tensors that lie outside of the layers (encoder states,
position biases, prefixes), and FSDP's hooks and tensor-parallel collectives run as in any forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from luban.core.errors import TrainingError
from luban.parallel.remat.host import Transfers
from luban.planner.remat.chain import Operation

Stage = Callable[[Tensor], Tensor]  # a layer: (B, T, E) → (B, T, E)
Place = tuple[int, int]  # stage, and which of its saved tensors


@dataclass
class Saved:
    """What one forward pass of a stage leaves."""

    tensors: list[Tensor] = field(default_factory=list)  # saved for the backward pass
    output: Tensor | None = None


class ScheduledRun:
    """One forward and backward pass through a chain of stages.

    Args:
        stages: in order.
        operations: a schedule of them, as `luban.planner.remat` makes it.
        random: stages draw random numbers (dropout), which must be the same when they run again.
        transfers: of tensors to the host and back, beside the operations.
        watch: called with this run after every operation, for tests that count memory.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        operations: Sequence[Operation],
        *,
        random: bool = False,
        transfers: Transfers | None = None,
        watch: Callable[[ScheduledRun], None] | None = None,
    ):
        self.stages, self.operations, self.random, self.watch = stages, operations, random, watch
        self.transfers = transfers
        self.at = 0  # the operation that is carried out next
        self.begun = -1  # the last operation that has begun
        self.kept: dict[int, Tensor] = {}  # index i → x_i, the input of stage i
        self.saved: dict[int, Saved] = {}
        self._generators: list[RandomState] = []  # of each stage, before it ran first
        self._requires: list[bool] = []  # of each stage's input
        self._counts: list[int] = []  # tensors that each stage saves

    def forward(self, x: Tensor) -> Tensor:
        """Everything before the loss: x (B, T, E) → (B, T, E)."""
        self.kept[0] = x.detach()
        while (op := self.operations[self.at]).action != "loss":
            self._begin()
            self._requires.append(x.requires_grad)
            if self.random:
                self._generators.append(RandomState(x.device))
            found = Saved()
            count = [0]
            with saved_tensors_hooks(partial(self._pack, op, found, count), self._unpack):
                x = self.stages[op.stage](x)
            self._counts.append(count[0])
            self._put(op, found, x)
        self._begin()
        self._advanced()
        return x

    def named(self) -> dict[tuple[str, int], list[Tensor]]:
        """Everything that is held for the backward pass, by kind and number as in a schedule."""
        found = {("x", index): [x] for index, x in self.kept.items()}
        for stage, each in self.saved.items():
            found["saved", stage] = [*each.tensors, *([] if each.output is None else [each.output])]
        return found

    def tensors(self) -> list[Tensor]:
        """The same without names."""
        return [tensor for each in self.named().values() for tensor in each]

    def _pack(self, op: Operation, found: Saved, count: list[int], tensor: Tensor) -> Place:
        if op.action == "forward_save":
            found.tensors.append(tensor.detach())  # with its graph it would keep itself alive
            whole = tensor if tensor._base is None else tensor._base
            if self.transfers is not None and isinstance(whole, nn.Parameter):
                self.transfers.outside.add(whole.untyped_storage()._cdata)  # FSDP has gathered it only now
        count[0] += 1
        return op.stage, count[0] - 1

    def _unpack(self, place: Place) -> Tensor:
        stage, index = place
        while self.operations[self.at] != Operation("backward", stage):
            self._carry_out(self.operations[self.at])
        self._begin()
        return self.saved[stage].tensors[index]

    def _begin(self) -> None:
        """Before the next operation, once."""
        if self.begun < self.at:
            self.begun = self.at
            if self.transfers is not None:
                self.transfers.before(self.at)

    def _carry_out(self, op: Operation) -> None:
        self._begin()
        if op.action != "backward":
            self._compute_again(op)
            return
        del self.saved[op.stage]  # autograd is done with it: it asks for an earlier stage's
        self.kept.pop(op.stage, None)
        self._advanced()

    def _compute_again(self, op: Operation) -> None:
        stage = op.stage
        x = self.kept[stage] if stage in self.kept else self.saved[stage - 1].output
        assert x is not None
        found, count = Saved(), [0]
        generator = self._generators[stage].again() if self.random else None
        # gradients are enabled in passes that save nothing, too, so that a compiled layer runs the same code every time
        with torch.enable_grad(), saved_tensors_hooks(partial(self._pack, op, found, count), self._unpack):
            y = self.stages[stage](x.detach().requires_grad_(self._requires[stage]))
        if generator is not None:
            generator.restore()
        if count[0] != self._counts[stage]:
            raise TrainingError(
                f"layer {stage} saved {self._counts[stage]} tensors in the forward pass and {count[0]} when it was computed "
                "again: plan.remat needs layers that compute the same each time"
            )
        self._put(op, found, y)

    def _put(self, op: Operation, found: Saved, y: Tensor) -> None:
        """Keep and free what the operation says."""
        if op.action == "forward_save":
            found.output = y.detach()
            self.saved[op.stage] = found
        else:
            self.kept[op.stage + 1] = y.detach()
        if op.action == "forward":
            self.kept.pop(op.stage, None)
        self._advanced()

    def _advanced(self) -> None:
        if self.operations[self.at].action == "loss":
            self.kept.pop(self.operations[self.at].stage, None)
        if self.watch is not None:
            self.watch(self)
        if self.transfers is not None:
            self.transfers.after(self.at, self.named())
        self.at += 1


class RandomState:
    """The states of the random-number generators of the CPU and of a device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def again(self) -> RandomState:
        """Go back to these states; returns those that were current."""
        current = RandomState(self.device)
        self.restore()
        return current

    def restore(self) -> None:
        """Make these states current."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)
