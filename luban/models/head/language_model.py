"""One linear layer to the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from luban.core.opgraph import Op
from luban.models.head.base import Head, check_tied, lm_head, lm_head_op

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Head):
    """(…, E) → (…, V) logits (`luban.nn.lm_head.LMHead`)."""

    bias: bool = False  # a bias a token
    scale_hidden: bool = False  # divide the hidden states by √E first (T5, whose embeddings aren't scaled down)

    def check(self, spec: ModelSpec) -> None:
        """Tied layers have the embedding's width."""
        check_tied(spec, spec.body.hidden_width(spec))

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The layer."""
        width = spec.body.hidden_width(spec)
        return lm_head(spec, tokens, width, bias=self.bias, scale=width**-0.5 if self.scale_hidden else 1.0)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """One matmul."""
        return [lm_head_op(spec, batch * seq, spec.body.hidden_width(spec), bias=self.bias)]
