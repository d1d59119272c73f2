"""The micro-batches of a step in a pipeline: one process's row of the schedule, executed.

Stages receive hidden states before a forward and gradients before a backward pass, and send theirs on, without waiting for
the receiver. Hidden states that several stages read (an encoder's) have the sum of these stages' gradients.
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
from luban.parallel.stages import Boundary, leaf
from luban.parallel.world import World
from luban.planner.pipeline.tables import table_of

if TYPE_CHECKING:
    from luban.parallel.sharded_params import ShardedParams  # FSDP is slow to import


LOSS = -1  # in the place of a stack


@dataclass
class Stashed:
    """What a forward pass leaves for its backward pass."""

    inputs: dict[int, Tensor]  # stack → received hidden states
    outputs: dict[int, Tensor]  # stack → those that others read; LOSS → the loss
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
    # (stage, micro-batch, stack) → hidden states that a later stage of this process reads, and their gradients from there
    states: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    gradients: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def train(self, micro_batches: Sequence[MicroBatch], factor: float | Tensor) -> Totals:
        """This process's row of the schedule."""
        totals = Totals([])
        self.gradients.clear()  # of a step that was abandoned
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
        outputs = {LOSS: found.sum * factor} if isinstance(found, LossOutput) else found
        self.stashed[action.stage, action.micro_batch] = Stashed(inputs, outputs)

    def _forward(
        self, action: Action, batch: MicroBatch, function: LossFunction
    ) -> tuple[dict[int, Tensor], LossOutput | dict[int, Tensor]]:
        """Received hidden states, and the loss or the hidden states that other stages read."""
        _, stage, m = action
        key = tuple(_shapes(batch))
        inputs = self._inputs(stage, m, key)
        self.boundary.begin(stage, inputs)
        with torch.enable_grad():
            found = function(batch)
        if isinstance(found, LossOutput):
            return inputs, found
        outputs = {}
        for stack, readers in self.boundary.routes.readers[stage].items():
            states = found[stack]
            if not self.boundary.part(stack).finished:
                outputs[stack] = states
            for reader in readers:
                if self.boundary.routes.local(stage, reader):
                    self.states[stage, m, stack] = states.detach()
                else:
                    self.channels.tell_shape(stage, reader, stack, key, states)
                    self.channels.send(stage, reader, m, stack, states)
        return inputs, outputs

    def _inputs(self, stage: int, m: int, key: Hashable) -> dict[int, Tensor]:
        """Stack → hidden states from other stages."""
        routes, found = self.boundary.routes, {}
        for stack, source in routes.sources[stage].items():
            if routes.local(source, stage):
                states = self.states[source, m, stack]
                if stage == max(reader for reader in routes.readers[source][stack] if routes.local(source, reader)):
                    del self.states[source, m, stack]
            else:
                like = self.channels.hear_shape(stage, source, stack, key)
                states = self.channels.receive(stage, source, m, stack, like)
            found[stack] = leaf(states)
        return found

    def _backward(self, action: Action) -> None:
        kind, stage, m = action
        stash = self.stashed[stage, m] if kind == "I" else self.stashed.pop((stage, m))
        gradients, inputs, outputs = self._incoming(stash, action), [*stash.inputs.values()], [*stash.outputs.values()]
        if kind == "I":
            chain = len(self.boundary.routes.parts[stage]) == 1
            found, stash.weights = input_gradients(outputs, gradients, inputs, self.params.working, chain=chain)
        else:
            self.params.begin_micro_batch(last=True)
            torch.autograd.backward(outputs, gradients)
            self.params.accumulate()
            found = [x.grad for x in inputs]
        self._send_back(stash, action, found)

    def _incoming(self, stash: Stashed, action: Action) -> list[Tensor] | None:
        """Gradients of the stage's outputs, each the sum over the stages that read it; None: the output is the loss."""
        if LOSS in stash.outputs:
            return None
        _, stage, m = action
        return [self._sum(None, stage, m, stack, x) for stack, x in stash.outputs.items()]

    def _sum(self, own: Tensor | None, stage: int, m: int, stack: int, x: Tensor) -> Tensor:
        """The gradient of hidden states `x`: the stage's `own`, plus those of the stages that have them from it."""
        routes = self.boundary.routes
        terms = [] if own is None else [own]
        for reader in routes.readers[stage].get(stack, []):
            if not routes.local(stage, reader):
                terms.append(self.channels.receive(stage, reader, m, stack, (x.dtype, x.shape)))
        if (local := self.gradients.pop((stage, m, stack), None)) is not None:
            terms.append(local)
        if not terms:
            return torch.zeros_like(x)
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum(0)

    def _send_back(self, stash: Stashed, action: Action, gradients: Sequence[Tensor | None]) -> None:
        """Gradients of what the stage received, to the stage that it had it from."""
        _, stage, m = action
        routes = self.boundary.routes
        for (stack, x), own in zip(stash.inputs.items(), gradients, strict=True):
            source = routes.sources[stage][stack]
            # states that other stages of this process read, too; those of a stack that goes on are this stage's input alone
            shared = routes.parts[stage][stack].finished
            whole = self._sum(own, stage, m, stack, x) if shared else torch.zeros_like(x) if own is None else own
            if routes.local(source, stage):
                before = self.gradients.get((source, m, stack))
                self.gradients[source, m, stack] = whole if before is None else before + whole
            else:
                self.channels.send(stage, source, m, stack, whole)

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
