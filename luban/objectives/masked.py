"""Masked language modelling: some tokens are hidden and predicted from both sides (BERT, RoBERTa, ALBERT)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import nn

from luban.core.errors import ConfigError
from luban.data.collate.masked import Masking, PairRows, masked_rows
from luban.data.collate.pairing import Pairing
from luban.data.collate.selection import Selection, Tokens
from luban.data.collate.special_tokens import MASK, SpecialTokens
from luban.data.packing import Packing
from luban.data.shards import Shards
from luban.nn.attention.backend import AttentionBackend
from luban.nn.precision import at_least_float32
from luban.objectives.base import LossModule, LossOutput, Objective, TensorBatch, ignore_untrained
from luban.objectives.causal import CausalLoss


@dataclass(frozen=True, kw_only=True)
class Masked(Objective):
    """15% of the tokens are predicted; of these 80% become the mask token, 10% another token, 10% stay.

    BERT: `copies = 10` and next-sentence pairs. RoBERTa: the defaults. ALBERT: n-grams and sentence order.
    """

    rate: float = 0.15  # share of the text that is predicted
    masked: float = 0.8  # share of these that becomes the mask token
    random: float = 0.1  # share that becomes a random token; the rest stays
    selection: Selection = field(default_factory=Tokens)  # which tokens
    copies: int = 0  # different masks of a row, one epoch each and again (static, BERT: 10); 0: a new one every epoch
    pairing: Pairing | None = None  # pairs of segments, whose class is predicted too; none: packed documents

    bodies = ("encoder",)
    heads = ("masked_lm", "language_model")

    def __post_init__(self):
        if not (0 < self.rate <= 1 and self.masked >= 0 and self.random >= 0 and self.masked + self.random <= 1):
            raise ConfigError("rate must be in (0, 1], and masked and random shares that sum to at most 1")
        if self.copies < 0:
            raise ConfigError(f"copies must be at least 0, {self.copies} given")

    def require(self, head: object, *, causal: bool, tied: bool) -> None:
        """Pairs need an output of their own."""
        if self.pairing is not None and not getattr(head, "pair", False):
            raise ConfigError("pairs need a head with a second output: set model.head.pair = true")

    def masking(self, special: SpecialTokens, seed: int) -> Masking:
        """How tokens of this vocabulary are hidden."""
        return Masking(
            special=special,
            seed=seed,
            rate=self.rate,
            masked=self.masked,
            random=self.random,
            selection=self.selection,
            copies=self.copies,
        )

    def examples(self, shards: Shards, *, seq_len: int, seed: int, packing: str) -> Packing:
        """Packed rows or pairs, with tokens hidden."""
        special = SpecialTokens.of(shards)
        special.need(MASK, "mask")
        masking = self.masking(special, seed)
        if self.pairing is not None:
            return PairRows(shards, masking, self.pairing, seq_len)
        return masked_rows(shards, masking, seq_len=seq_len, packing=packing)

    def loss(self, model: nn.Module, attention: AttentionBackend | None = None) -> LossModule:
        """Cross-entropy of the hidden tokens; with pairs also of their class, weighted as a mean of its own."""
        return CausalLoss(model, attention) if self.pairing is None else PairLoss(model, attention)


class PairLoss(LossModule):
    """Summed cross-entropy of the hidden tokens, and of the pairs' classes so weighted that dividing both by the number of
    hidden tokens leaves a mean over tokens and one over pairs."""

    def forward(self, batch: TensorBatch) -> LossOutput:
        """The summed loss of a batch."""
        hidden = self.hidden(batch, segments=batch["segments"])
        tokens = self.model.head(hidden, ignore_untrained(batch["targets"], batch["loss_mask"]))
        classes = F.cross_entropy(at_least_float32(self.model.head.pairs(hidden)), batch["labels"], reduction="none")
        classes = (classes * batch["weights"]).sum()
        count = batch["loss_mask"].sum()
        metrics = {"token_loss": (tokens.detach(), count), "pair_loss": (classes.detach(), count)}
        return LossOutput(tokens + classes, metrics)
