"""A forward and a backward language model trained together (ELMo, Peters et al. 2018, section 3.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from luban.core.errors import ConfigError
from luban.data.collate.bidirectional import bidirectional_rows
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.objectives.base import LossModule, Objective
from luban.objectives.causal import CausalLoss


@dataclass(frozen=True, kw_only=True)
class Bidirectional(Objective):
    """Every token is predicted from those before it and from those after it; the loss is the mean over both."""

    characters: int = 0  # length of a word for models that make it of its bytes; 0: token ids

    bodies = ("elmo",)
    heads = ("language_model",)

    def __post_init__(self):
        if self.characters < 0 or 0 < self.characters < 3:
            raise ConfigError(
                f"characters must be 0, or at least 3 for a byte between begin and end, {self.characters} given"
            )

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows with two targets a token."""
        return bidirectional_rows(shards, seq_len=seq_len, packing=packing, characters=self.characters)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """The body gives (B, T, 2, E), so that each direction meets its own targets under one head."""
        return CausalLoss(model, attention)
