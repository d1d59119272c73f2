"""A task with language modelling beside it: L_task + λ · L_lm (GPT-1, Radford et al. 2018, equation 5)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from luban.core.errors import ConfigError, DataError
from luban.data.collate.auxiliary import auxiliary_rows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained


@dataclass(frozen=True, kw_only=True)
class Auxiliary(Objective):
    """The answers of conversations are the task; every token but padding is a target of the language model too.

    Both are means over their own targets, whatever the number of micro-batches.
    """

    weight: float = 0.5  # λ

    bodies = ("decoder",)
    heads = ("language_model",)

    def __post_init__(self):
        if self.weight < 0:
            raise ConfigError(f"the auxiliary loss's weight must be at least 0, {self.weight} given")

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows with both sets of targets. Raises DataError for shards without a task."""
        if not shards.has_mask:
            raise DataError(
                f"shards {shards.path} hold plain text, so every target is already the language model's: "
                "the auxiliary objective needs conversations"
            )
        return auxiliary_rows(shards, seq_len=seq_len, packing=packing, weight=self.weight)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """The sum over the task's targets, the weighted sum over all targets added."""
        return AuxiliaryLoss(model, attention)


class AuxiliaryLoss(LossModule):
    """Summed cross-entropy over the task's targets, and the weighted one over all."""

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        hidden = self.hidden(batch)
        task = self.model.head(hidden, ignore_untrained(batch["targets"], batch["loss_mask"]))
        language = self.model.head(hidden, ignore_untrained(batch["targets"], batch["others"]))
        metrics = {
            "task_loss": (task.detach(), batch["loss_mask"].sum()),
            "language_loss": (language.detach(), batch["others"].sum()),
        }
        return LossOutput(task + batch["weights"][0] * language, metrics)
