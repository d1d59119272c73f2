"""PipeDream's pipeline (Narayanan et al. 2019): every micro-batch updates the weights, and nobody waits for the others.

A stage's weights change between a micro-batch's forward and its backward pass; the backward pass uses those of its forward
pass, which are kept until then (weight stashing). Stages update by themselves: their gradients are never clipped together.

Departure: the pipeline is empty between two steps of training, where the run may be saved or measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from luban.core.pipeline_order import Action
from luban.objectives.base import LossModule
from luban.parallel.micro_batches import MicroBatch, Totals
from luban.parallel.pipelined import Pipelined
from luban.parallel.stages import run_stage

Change = Callable[[Mapping[str, Tensor]], Tensor]  # update by gradients; returns their norm


@dataclass
class Asynchronous(Pipelined):
    """The stage of one process.

    Args:
        module: the loss module; its parameters are `params.working`.
    """

    module: LossModule = field(kw_only=True)
    versions: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # micro-batch → the weights that it met
    change: Change | None = None  # updates the weights in the step that runs
    norms: list[Tensor] = field(default_factory=list)  # of its updates

    def train_and_update(
        self, micro_batches: Sequence[MicroBatch], factor: float | Tensor, change: Change
    ) -> tuple[Totals, Tensor]:
        """This process's row of the schedule, and the root mean square of the norms of its updates."""
        self.change, self.norms = change, []
        totals = self.train(micro_batches, factor * len(micro_batches))
        return totals, torch.stack(self.norms).square().mean().sqrt()

    def _act(self, action: Action, micro_batches: Sequence[MicroBatch], factor: float | Tensor, totals: Totals) -> None:
        kind, stage, m = action
        if kind == "F":
            # the weights themselves, but with a version counter of their own, so that updates may overwrite them afterwards
            self.versions[m] = {
                f"model.{name}": weight.data.requires_grad_() for name, weight in self.params.working.items()
            }
            self._forward_and_stash(action, micro_batches[m], self._at_version(m), factor, totals)
            return
        stash, weights = self.stashed.pop((stage, m)), self.versions.pop(m)
        needed = [*stash.inputs.values(), *weights.values()]
        gradients = self._incoming(stash, action)
        found = torch.autograd.grad([*stash.outputs.values()], needed, gradients, allow_unused=True)
        self._send_back(stash, action, found[: len(stash.inputs)])
        named = zip(weights, found[len(stash.inputs) :], strict=True)
        self._keep_versions()
        assert self.change is not None
        self.norms.append(self.change({n.removeprefix("model."): g for n, g in named if g is not None}))

    def _keep_versions(self) -> None:
        """Before an update: where other micro-batches have met these weights, update a copy and leave them as they are."""
        kept = {weight.data_ptr() for version in self.versions.values() for weight in version.values()}
        for weight in self.params.working.values():
            if weight.data_ptr() in kept:
                weight.data = weight.data.clone()

    def _at_version(self, m: int):
        return lambda batch: run_stage(functional_call, self.module, self.versions[m], (batch,))
