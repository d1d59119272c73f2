"""One linear layer to the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.models.head.base import Head, check_tied, describe_lm_head, lm_head

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

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """One matmul."""
        describe_lm_head(graph, "", spec, hidden, bias=self.bias)
