"""One optimizer step: micro-batches, a loss normalised by the tokens of the whole step, clipping, update.

Nothing in a step waits for the device: whether it was good is decided there, and told to the host when it asks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luban.data.batch import Batch
from luban.optim.clip import clip_factor, global_norm
from luban.optim.family import Stepper, Update
from luban.train.compile import LossFunction
from luban.train.precision import LossScale, Masters


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one step did."""

    loss: float  # mean of the objective in nats a trained token, over the whole step
    tokens: int  # real tokens read (no padding)
    grad_norm: float  # global norm before clipping
    bad: bool  # NaN or infinite: nothing was updated
    explained: bool  # bad, but only because the fp16 loss scale was too large


@dataclass(frozen=True)
class Launched:
    """A step that the device may still be working on."""

    figures: Tensor  # (2,) on the host: summed loss, gradient norm with the loss scale still in it
    done: torch.cuda.Event | None  # when they have arrived; none on a CPU, where they have
    trained: int  # tokens that the loss was summed over
    tokens: int  # real tokens read
    scale: float  # the loss scale it ran with


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
        """One optimizer step at `factor` times the peak learning rate, to its end."""
        return self.settle(self.launch(batch, factor))

    def launch(self, batch: Batch, factor: float) -> Launched:
        """Start one optimizer step.

        The loss of every micro-batch is a sum over its trained tokens, divided by the trained tokens of all
        of them, so that cutting a batch into micro-batches changes nothing but rounding.
        """
        trained, scale = max(int(batch.tokens_trained), 1), self.scale.value
        total = torch.zeros((), device=self.device)
        for arrays in self._micro_batches(batch):
            loss = self.loss(*arrays)
            (loss * (scale / trained)).backward()
            if self.accumulate > 1:
                self.masters.collect()
            total += loss.detach()
        gradients = self.masters.gradients()
        norm = global_norm(list(gradients.values()))
        good = total.isfinite() & norm.isfinite()
        self.optimizer.step(factor, Update(gradients, clip_factor(norm, self.clip, scale), good, self.masters.copies()))
        self.masters.clear()
        figures, done = _to_host(torch.stack([total, norm]))
        return Launched(figures, done, trained, batch.tokens_read, scale)

    def settle(self, launched: Launched) -> StepResult:
        """Wait for a step's end and take its figures up."""
        if launched.done is not None:
            launched.done.synchronize()
        loss, norm = launched.figures.tolist()
        bad = not (np.isfinite(loss) and np.isfinite(norm))
        explained = self.scale.update(bad) and bool(np.isfinite(loss))
        return StepResult(loss=loss / launched.trained, tokens=launched.tokens, grad_norm=norm / launched.scale,
                          bad=bad, explained=explained)  # fmt: skip

    def _micro_batches(self, batch: Batch) -> Iterator[tuple[Tensor, ...]]:
        tensors = to_device(batch, self.device)
        yield from zip(*(tensor.chunk(self.accumulate) for tensor in tensors), strict=True)


def _to_host(figures: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if not figures.is_cuda:
        return figures, None
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    host.copy_(figures, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    return host, done
