"""One optimizer step: micro-batches, a loss normalised by the tokens of the whole step, clipping, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from luban.data.batch import Batch
from luban.objectives.family import Objective
from luban.optim.clip import global_norm, scale_
from luban.optim.family import Stepper
from luban.train.precision import LossScale, Masters

LossFunction = Callable[..., Tensor]  # a batch's arrays → fp32 sum of losses


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    loss: float  # mean cross-entropy in nats a trained token, over the whole step
    tokens: int  # real tokens read (no padding)
    grad_norm: float  # global norm before clipping
    bad: bool  # NaN or infinite: nothing was updated
    explained: bool  # bad, but only because the fp16 loss scale was too large


def loss_function(module: nn.Module, objective: Objective, *, compiled: bool) -> LossFunction:
    """The summed loss of a batch as one function, compiled or not."""

    def summed(*arrays: Tensor) -> Tensor:
        return objective.loss(module, *arrays)[0]

    return torch.compile(summed, dynamic=False) if compiled else summed


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, ...]:
    """The batch's arrays as tensors, each with its rows first."""
    tensors = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in batch.arrays())
    if device.type == "cuda":
        tensors = tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tensors


class TrainStep:
    """Turns batches into updates."""

    def __init__(self, loss: LossFunction, masters: Masters, optimizer: Stepper, scale: LossScale, *,
                 clip: float, accumulate: int, device: torch.device):  # fmt: skip
        self.loss, self.masters, self.optimizer, self.scale = loss, masters, optimizer, scale
        self.clip, self.accumulate, self.device = clip, accumulate, device

    def __call__(self, batch: Batch, factor: float) -> StepResult:
        """One optimizer step at `factor` times the peak learning rate.

        The loss of every micro-batch is a sum over its trained tokens, divided by the trained tokens of all
        of them, so that cutting a batch into micro-batches changes nothing but rounding.
        """
        trained = max(int(batch.tokens_trained), 1)
        total = torch.zeros((), device=self.device)
        for arrays in self._micro_batches(batch):
            loss = self.loss(*arrays)
            (loss * (self.scale.value / trained)).backward()
            self.masters.collect()
            total += loss.detach()
        gradients = self.masters.gradients()
        loss_sum, norm = torch.stack([total, global_norm(gradients)]).tolist()
        good = bool(np.isfinite(loss_sum) and np.isfinite(norm))
        if good:
            norm = scale_(gradients, norm, self.clip, divide_by=self.scale.value)
            self.optimizer.step(factor)
            self.masters.publish()
        self.masters.clear()
        explained = self.scale.update(not good) and bool(np.isfinite(loss_sum))
        return StepResult(loss=loss_sum / trained, tokens=batch.tokens_read, grad_norm=norm,
                          bad=not good, explained=explained)  # fmt: skip

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, ...]]:
        tensors = to_device(batch, self.device)
        yield from zip(*(tensor.chunk(self.accumulate) for tensor in tensors), strict=True)
