"""Denoising: an encoder reads a corrupted text, a decoder writes the whole text as it was (BART, Lewis et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from luban.data.collate.noise import Noise, SentencePermutation, TextInfilling
from luban.data.collate.source import CorruptedRows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained


class SourceLoss(LossModule):
    """Summed cross-entropy of what the decoder writes (teacher forcing).

    Args:
        smoothing: share of every target spread evenly over the vocabulary.
    """

    def __init__(self, model: nn.Module, attention: AttentionBackend | None = None, *, smoothing: float = 0.0):
        super().__init__(model, attention)
        self.smoothing = smoothing

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        hidden = self.model(
            batch["source"], batch["tokens"], batch["source_mask"], attention=self.attention, output="hidden"
        )
        targets = ignore_untrained(batch["targets"], batch["loss_mask"])
        return LossOutput(self.model.head(hidden, targets, smoothing=self.smoothing))


@dataclass(frozen=True, kw_only=True)
class Denoising(Objective):
    """BART's: 30% of the tokens in spans of Poisson(3), each one mask token, and sentences in another order."""

    noise: Noise = field(default_factory=lambda: TextInfilling(then=SentencePermutation()))  # what corrupts the text

    bodies = ("encoder_decoder",)
    heads = ("language_model",)

    def decoder_start(self, shards: Shards) -> int:
        """Id of the token that ends a document, as in BART."""
        return shards.config["eos_id"]

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Pieces of documents, one a row."""
        return CorruptedRows(shards, seq_len, seed, noise=self.noise, start=self.decoder_start(shards))

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Cross-entropy of the whole text."""
        return SourceLoss(model, attention)
