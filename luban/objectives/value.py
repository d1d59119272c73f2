"""The critic of PPO: a value at every token, regressed on returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.data.collate.rollout import RolloutRows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.nn.precision import at_least_float32
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch
from luban.objectives.policy_losses import clipped_value_loss


@dataclass(frozen=True, kw_only=True)
class ValueFunction(Objective):
    """Values of unfinished answers (a decoder with a value head)."""

    clip: float = 0.2  # by which a value may move from that of the round's start

    bodies = ("decoder",)
    heads = ("value",)

    def __post_init__(self):
        if not self.clip > 0:
            raise ConfigError(f"the clipping range of values must be above 0, {self.clip} given")

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Rows of the right shape."""
        return RolloutRows(shards, seq_len)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Clipped squared errors."""
        return ValueLoss(model, attention, clip=self.clip)


class ValueLoss(LossModule):
    """Sum over the answers' tokens of the clipped squared error."""

    def __init__(self, model: nn.Module, attention: AttentionBackend | None = None, *, clip: float = 0.2):
        super().__init__(model, attention)
        self.clip = clip

    def values(self, batch: TensorBatch) -> Tensor:
        """(B, T) float32: the value of what has been read up to each token."""
        hidden_BTE = self.hidden(batch)
        return at_least_float32(self.model.head(hidden_BTE.flatten(0, 1)[:, None])).view(hidden_BTE.shape[:2])

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        mask = batch["loss_mask"]
        loss = clipped_value_loss(self.values(batch), batch["old_values"], batch["returns"], self.clip)
        return LossOutput(torch.where(mask, batch["weights"] * loss, 0.0).sum())
