"""Text to text: an encoder reads a text, a decoder writes what belongs to it: a translation, a summary, an answer
(Vaswani et al. 2017, section 3; Raffel et al. 2020, section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from luban.core.errors import ConfigError
from luban.data.collate.text_to_text import TextToTextRows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, Objective
from luban.objectives.denoising import SourceLoss


@dataclass(frozen=True, kw_only=True)
class TextToText(Objective):
    """The answers of conversations from what stands before them, with teacher forcing."""

    smoothing: float = 0.0  # share of every target spread evenly over the vocabulary (Vaswani et al. 2017: 0.1)

    bodies = ("encoder_decoder",)
    heads = ("language_model",)

    def __post_init__(self):
        if not 0 <= self.smoothing < 1:
            raise ConfigError(f"smoothing is a share below 1, {self.smoothing} given")

    def decoder_start(self, shards: Shards) -> int:
        """Padding, as T5's."""
        return shards.pad_id

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """A conversation a row. Raises DataError for shards of plain text."""
        return TextToTextRows(shards, seq_len, start=self.decoder_start(shards))

    def measured(self) -> TextToText:
        """Bare cross-entropy."""
        return TextToText()

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Cross-entropy of the answers."""
        return SourceLoss(model, attention, smoothing=self.smoothing)
