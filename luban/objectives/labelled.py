"""Fine-tuning on labelled texts, with language modelling beside it: L_task + λ · L_lm (GPT-1, Radford et al. 2018,
sections 3.2 and 3.3; with λ = 0 also BERT's way, Devlin et al. 2019, section 4.1).

The data are conversations whose answer is the label. A row is what stands before the answer; the token there, which the
chat template puts before every answer, is GPT-1's extract token, and the classes are read off it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from luban.core.errors import ConfigError
from luban.data.collate.labelled import LabelledRows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.nn.precision import at_least_float32
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained, router_training


@dataclass(frozen=True, kw_only=True)
class Labelled(Objective):
    """The class of a text. The language model's loss is over the text itself, with the embedding as output layer."""

    labels: tuple[str, ...] = ()  # what the answers say, class by class
    weight: float = 0.0  # λ of the language model's loss (GPT-1: 0.5)

    bodies = ("decoder", "encoder")
    heads = ("classes",)

    def __post_init__(self):
        if len(set(self.labels)) != len(self.labels):
            raise ConfigError(f"the labels {', '.join(self.labels)} repeat themselves")
        if self.weight < 0:
            raise ConfigError(f"the language model's weight must be at least 0, {self.weight} given")

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """A class a label; for the language model a causal body whose output layer's weight is the embedding's."""
        count = getattr(head, "count", 0)
        if count != len(self.labels):
            raise ConfigError(
                f"the head has {count} classes and the objective {len(self.labels)} labels: "
                f"set model.head.count = {len(self.labels)}, or objective.labels"
            )
        if causal and getattr(head, "pooling", "") == "first":
            raise ConfigError(
                'the first token of a decoder has seen nothing of the text: set model.head.pooling = "last"'
            )
        if self.weight and not (causal and tied):
            raise ConfigError(
                "the language model's loss needs a decoder whose output layer is the embedding: "
                "set objective.weight = 0, or train a decoder with model.tied_head = true"
            )

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """A text a row."""
        return LabelledRows(shards, seq_len, labels=self.labels, weight=self.weight)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Sum of the classes' cross-entropies, the language model's weighted sum added."""
        return LabelledLoss(model, attention, language=self.weight > 0)


class LabelledLoss(LossModule):
    """Summed cross-entropy of the rows' classes.

    Args:
        language: add the language model's, weighted as the batch says.
    """

    def __init__(self, model: nn.Module, attention: AttentionBackend | None = None, *, language: bool):
        super().__init__(model, attention)
        self.language = language

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        mask, real = batch["documents"] >= 0, batch["loss_mask"].any(-1)
        hidden = self.model(
            batch["tokens"],
            mask,
            positions=batch["positions"],
            attention=self.attention,
            routing=router_training(batch),
            output="hidden",
        )
        logits = at_least_float32(self.model.head(hidden, mask=mask))
        total = (F.cross_entropy(logits, batch["labels"], reduction="none") * real).sum()
        if not self.language:
            return LossOutput(total)
        language = self.model.head.language_model(hidden, ignore_untrained(batch["targets"], batch["follows"]))
        metrics = {
            "class_loss": (total.detach(), real.sum()),
            "language_loss": (language.detach(), batch["follows"].sum()),
        }
        return LossOutput(total + batch["weights"][0] * language, metrics)
