"""The micro-batches of a step in a pipeline: one process's row of the schedule, executed.

Stages receive hidden states before a forward and gradients before a backward pass, and send theirs on, without waiting for
the receiver.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from luban.core.pipeline_order import Action
from luban.objectives.base import LossOutput
from luban.parallel.channels import Channels
from luban.parallel.compile import LossFunction
from luban.parallel.micro_batches import MicroBatch, Totals
from luban.parallel.precision import MixedPrecisionParams
from luban.parallel.split_backward import WeightPass, input_gradients
from luban.parallel.stages import Boundary, leaves
from luban.parallel.world import World
from luban.planner.pipeline.tables import table_of

if TYPE_CHECKING:
    from luban.parallel.sharded_params import ShardedParams  # FSDP is slow to import


@dataclass
class Stashed:
    """What a forward pass leaves for its backward pass."""

    inputs: list[Tensor]  # received hidden states
    outputs: list[Tensor]  # sent ones, or the loss
    weights: WeightPass | None = None  # what is left to do after the input's gradients


@dataclass
class Pipelined:
    """The stages of one process.

    Args:
        loss: of a batch in training, or a tuple of hidden states where the stage isn't the last; `heldout`: of a held-out
            batch.
        dtype: of the loss.
    """

    loss: LossFunction
    heldout: LossFunction
    params: MixedPrecisionParams | ShardedParams
    boundary: Boundary
    channels: Channels
    world: World
    dtype: torch.dtype
    stashed: dict[tuple[int, int], Stashed] = field(default_factory=dict)
    names: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of each loss's metrics, once known

    def train(self, micro_batches: Sequence[MicroBatch], factor: float | Tensor) -> Totals:
        """This process's row of the schedule."""
        totals = Totals([])
        for action in table_of(self.world.plan, len(micro_batches))[self.world.index("pipeline")]:
            self._act(action, micro_batches, factor, totals)
        self.channels.wait()
        return self._known(totals, "loss")

    def evaluate(self, batch: MicroBatch) -> Totals:
        """Of a held-out batch, in the process of the last stage; zeros in the others."""
        plan, totals = self.world.plan, Totals([])
        for stage in range(self.world.index("pipeline"), plan.stages, plan.pipeline):
            _, found = self._forward(Action("F", stage, 0), batch, self.heldout)
            if isinstance(found, LossOutput):
                totals.add(found)
        self.channels.wait()
        return self._known(totals, "heldout")

    def _act(self, action: Action, micro_batches: Sequence[MicroBatch], factor: float | Tensor, totals: Totals) -> None:
        kind, stage, m = action
        if kind == "F":
            self._forward_and_stash(action, micro_batches[m], self.loss, factor, totals)
        elif kind == "W":
            weights = self.stashed.pop((stage, m)).weights
            assert weights is not None
            weights()
            self.params.accumulate()
        else:
            self._backward(action)

    def _forward_and_stash(
        self, action: Action, batch: MicroBatch, function: LossFunction, factor: float | Tensor, totals: Totals
    ) -> None:
        inputs, found = self._forward(action, batch, function)
        if isinstance(found, LossOutput):
            totals.add(found)
        outputs = [found.sum * factor] if isinstance(found, LossOutput) else list(found)
        self.stashed[action.stage, action.micro_batch] = Stashed(inputs, outputs)

    def _forward(
        self, action: Action, batch: MicroBatch, function: LossFunction
    ) -> tuple[list[Tensor], LossOutput | tuple[Tensor, ...]]:
        """Received hidden states, and the loss or what was sent on."""
        _, stage, m = action
        key, received = tuple(_shapes(batch)), {}
        if stage:
            crossing = self.boundary.crossing(stage - 1)
            like = self.channels.hear_shapes(stage, key, len(crossing))
            received = leaves(dict(zip(crossing, self.channels.receive(stage, stage - 1, m, like), strict=True)))
        self.boundary.begin(stage, received)
        with torch.enable_grad():
            found = function(batch)
        if not isinstance(found, LossOutput):
            self.channels.tell_shapes(stage, key, found)
            self.channels.send(stage, stage + 1, m, found)
        return list(received.values()), found

    def _backward(self, action: Action) -> None:
        kind, stage, m = action
        stash = self.stashed[stage, m] if kind == "I" else self.stashed.pop((stage, m))
        gradients = self._incoming(stash, action)
        if kind == "I":
            chain = len(self.boundary.parts[stage]) == 1
            found, stash.weights = input_gradients(
                stash.outputs, gradients, stash.inputs, self.params.working, chain=chain
            )
        else:
            self.params.begin_micro_batch(last=True)
            torch.autograd.backward(stash.outputs, gradients)
            self.params.accumulate()
            found = [x.grad for x in stash.inputs]
        self._send_back(stash, action, found)

    def _incoming(self, stash: Stashed, action: Action) -> list[Tensor] | None:
        """Gradients of what the stage sent on; None: it computed the loss."""
        stage = action.stage
        if stage + 1 == self.world.plan.stages:
            return None
        return self.channels.receive(stage, stage + 1, action.micro_batch, [(x.dtype, x.shape) for x in stash.outputs])

    def _send_back(self, stash: Stashed, action: Action, gradients: Sequence[Tensor | None]) -> None:
        """Gradients of what the stage received, to the stage that had sent it."""
        if action.stage:
            pairs = zip(stash.inputs, gradients, strict=True)
            whole = [torch.zeros_like(x) if gradient is None else gradient for x, gradient in pairs]
            self.channels.send(action.stage, action.stage - 1, action.micro_batch, whole)

    def _known(self, totals: Totals, which: str) -> Totals:
        """The totals of the last stage's process, and zeros under the same names in the others; `which` loss they are of."""
        if which not in self.names:
            found = [totals.names]
            last = (self.world.plan.stages - 1) % self.world.plan.pipeline
            dist.broadcast_object_list(found, group=self.world.group("pipeline"), group_src=last)
            self.names[which] = found[0]
        return totals if totals.values else Totals.none(self.channels.device, self.dtype, self.names[which])


def _shapes(batch: MicroBatch) -> Iterator[Hashable]:
    return ((name, tuple(tensor.shape)) for name, tensor in sorted(batch.items()))
