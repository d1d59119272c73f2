"""The micro-batches of a step: their forward and backward passes, one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from luban.objectives.base import LossOutput
from luban.parallel.compile import LossFunction
from luban.parallel.precision import MixedPrecisionParams

if TYPE_CHECKING:
    from luban.parallel.sharded_params import ShardedParams  # FSDP is slow to import

MicroBatch = dict[str, Tensor]


@dataclass
class Totals:
    """Sums over the micro-batches that this process computed: of the loss, and of each metric with its count."""

    values: list[Tensor]
    names: tuple[str, ...] = ()

    @classmethod
    def none(cls, device: torch.device, dtype: torch.dtype, names: tuple[str, ...] = ()) -> Totals:
        """Of a process that computes no loss."""
        return cls([torch.zeros((), device=device, dtype=dtype) for _ in range(1 + 2 * len(names))], names)

    def add(self, found: LossOutput) -> None:
        """Add those of a micro-batch."""
        parts = [found.sum.detach(), *(p.to(found.sum.dtype) for pair in found.metrics.values() for p in pair)]
        self.values = parts if not self.values else [a + b for a, b in zip(self.values, parts, strict=True)]
        self.names = tuple(found.metrics)


class Runner(Protocol):
    """How the micro-batches of a step run."""

    def train(self, micro_batches: Sequence[MicroBatch], factor: float | Tensor) -> Totals:
        """Gradients of `factor` times the summed loss, added to `params`."""
        ...

    def evaluate(self, batch: MicroBatch) -> Totals:
        """Of a held-out batch; zeros in a process that computes no loss."""
        ...


@dataclass(frozen=True)
class OneAfterTheOther:
    """Every process computes the whole loss.

    Args:
        loss: of a batch in training; `heldout`: of a held-out batch.
    """

    loss: LossFunction
    heldout: LossFunction
    params: MixedPrecisionParams | ShardedParams

    def train(self, micro_batches: Sequence[MicroBatch], factor: float | Tensor) -> Totals:
        """Forward and backward of each."""
        totals = Totals([])
        for number, micro_batch in enumerate(micro_batches, 1):
            self.params.begin_micro_batch(last=number == len(micro_batches))
            found = self.loss(micro_batch)
            (found.sum * factor).backward()
            if len(micro_batches) > 1:
                self.params.accumulate()
            totals.add(found)
        return totals

    def evaluate(self, batch: MicroBatch) -> Totals:
        """Of a held-out batch. Gradients stay enabled, since a compiled loss would otherwise be compiled a second time."""
        totals = Totals([])
        with torch.enable_grad():
            totals.add(self.heldout(batch))
        return totals
