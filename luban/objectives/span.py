"""Span corruption: spans become sentinels, and the decoder writes each sentinel with its span (T5, Raffel et al. 2020,
section 3.1.4 and figure 2)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from luban.core.errors import ConfigError
from luban.data.collate.span import SpanRows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, Objective
from luban.objectives.denoising import SourceLoss


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(Objective):
    """15% of the tokens in spans of 3 on average; sentinel i is the i-th id behind the tokenizer's."""

    rate: float = 0.15  # share of the tokens in spans
    mean_span: float = 3.0  # tokens a span, on average
    sentinels: int = 100  # ids added behind the tokenizer's vocabulary

    bodies = ("encoder_decoder",)
    heads = ("language_model",)

    def __post_init__(self):
        if not 0 < self.rate < 1 or self.mean_span < 1 or self.sentinels < 2:
            raise ConfigError("rate must be between 0 and 1, mean_span at least 1, sentinels at least 2")

    def extra_ids(self) -> int:
        """The sentinels."""
        return self.sentinels

    def decoder_start(self, shards: Shards) -> int:
        """Padding, as T5's."""
        return shards.pad_id

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Pieces of documents, one a row."""
        return SpanRows(
            shards,
            seq_len,
            seed,
            rate=self.rate,
            mean_span=self.mean_span,
            sentinels=self.sentinels,
            start=self.decoder_start(shards),
        )

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Cross-entropy of sentinels, spans and end."""
        return SourceLoss(model, attention)
