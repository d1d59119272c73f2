"""Causal language modelling: the cross-entropy of every trained next token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from luban.core.errors import ConfigError
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained


@dataclass(frozen=True, kw_only=True)
class Causal(Objective):
    """The next token from those before it; of conversations only what their mask trains."""

    bodies = ("decoder", "recurrent")
    heads = ("language_model",)
    reads_whole_text = True
    smoothing: float = 0.0  # share of every target spread evenly over the vocabulary (Szegedy et al. 2016, section 7)
    z_loss: float = 0.0  # factor on log²Z, which keeps logits from drifting (Chowdhery et al. 2022, section 5)

    def __post_init__(self):
        if not 0 <= self.smoothing < 1 or not 0 <= self.z_loss < float("inf"):
            raise ConfigError(
                f"smoothing is a share below 1 and z_loss a factor from 0 on: {self.smoothing} and {self.z_loss} given"
            )

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows as they are."""
        return PACKINGS[packing](shards, seq_len)

    def measured(self) -> Causal:
        """Bare cross-entropy."""
        return Causal()

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Cross-entropy of the trained targets."""
        return CausalLoss(model, attention, smoothing=self.smoothing, z_loss=self.z_loss)


class CausalLoss(LossModule):
    """Summed cross-entropy of the targets that `loss_mask` keeps."""

    def __init__(
        self,
        model: nn.Module,
        attention: AttentionBackend | None = None,
        *,
        smoothing: float = 0.0,
        z_loss: float = 0.0,
    ):
        super().__init__(model, attention)
        self.smoothing, self.z_loss = smoothing, z_loss

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        targets = ignore_untrained(batch["targets"], batch["loss_mask"])
        return LossOutput(self.model.head(self.hidden(batch), targets, smoothing=self.smoothing, z_loss=self.z_loss))
