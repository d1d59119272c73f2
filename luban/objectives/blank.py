"""Autoregressive blank infilling (GLM, Du et al. 2022, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from luban.core.errors import ConfigError
from luban.data.collate.blank import BlankRows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, Objective
from luban.objectives.prefix import SegmentLoss


@dataclass(frozen=True, kw_only=True)
class BlankInfilling(Objective):
    """Spans of the text become one mask token each (part A, seen both ways) and are written behind it in random
    order (part B, each token seeing part A and what was written before it)."""

    rate: float = 0.15  # share of the text that is blanked
    mean_span: float = 3.0  # of the Poisson lengths, in tokens

    bodies = ("decoder",)
    heads = ("language_model",)
    two_positions = True

    def __post_init__(self):
        if not 0 < self.rate < 1 or self.mean_span <= 0:
            raise ConfigError("rate must be between 0 and 1, and mean_span positive")

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Pieces of documents, one a row."""
        return BlankRows(shards, seq_len, seed, rate=self.rate, mean_span=self.mean_span)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Cross-entropy of the blanks' tokens and of the token that ends each."""
        return SegmentLoss(model, attention)
