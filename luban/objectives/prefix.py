"""Prefix language modelling: what is given is seen both ways, what follows is predicted (Raffel et al. 2020, section 3.2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from luban.data.collate.prefix import prefix_rows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained


class SegmentLoss(LossModule):
    """Summed cross-entropy of trained targets, segment 0 seen both ways."""

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        hidden = self.hidden(batch, segments=batch["segments"])
        return LossOutput(self.model.head(hidden, ignore_untrained(batch["targets"], batch["loss_mask"])))


@dataclass(frozen=True, kw_only=True)
class PrefixLM(Objective):
    """Each document of a row is cut at a random place, drawn anew every epoch; only what follows the cut is a target."""

    bodies = ("decoder",)
    heads = ("language_model",)

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows with their cuts."""
        return prefix_rows(shards, seq_len=seq_len, seed=seed, packing=packing)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Cross-entropy of what follows the cuts."""
        return SegmentLoss(model, attention)
