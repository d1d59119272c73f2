"""BERT's head: a linear layer, an activation, a norm, then the vocabulary with a bias a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.models.head.base import Head, check_tied, describe_lm_head, lm_head, one_token, pool
from luban.nn.feedforward.base import Activation
from luban.nn.feedforward.plain import GELU
from luban.nn.linear import Linear

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Head):
    """(…, E) → (…, V) logits.

    With `pair` there is a second output on the pooled first token, `module.head.pairs(hidden)` → (B, 2): whether a
    pair of segments belongs together (Devlin et al. 2019, section 3.1; Lan et al. 2020, section 3.1).
    """

    pair: bool = False  # the second output
    activation: Literal["gelu"] | None = None  # behind the first linear layer; none: the feed-forward's

    def check(self, spec: ModelSpec) -> None:
        """The last linear layer reads the embedding width."""
        check_tied(spec, spec.body.embedding_width(spec))

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module."""
        activation = type(spec.last.feedforward).activation if self.activation is None else GELU.activation
        return MaskedLMHead(spec, tokens, activation, pair=self.pair)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """Transform, norm, vocabulary; for pairs the pooler and two classes."""
        transformed = graph.linear("transform", hidden, spec.body.embedding_width(spec), bias=True)
        normed = spec.last.norm.describe(graph, "norm", transformed)
        describe_lm_head(graph, "vocabulary", spec, normed, bias=True)
        if self.pair:
            pooled = graph.linear("pool", one_token(hidden), hidden.shape[-1], bias=True)
            graph.linear("pair", pooled, 2, bias=True)


class MaskedLMHead(nn.Module):
    """vocabulary(norm(activation(transform(hidden))))."""

    def __init__(self, spec: ModelSpec, tokens: nn.Module, activation: Activation, *, pair: bool):
        super().__init__()
        width, table = spec.body.hidden_width(spec), spec.body.embedding_width(spec)
        self.transform = Linear(width, table)
        self.activation = activation
        self.norm = spec.last.norm.build(table)
        self.vocabulary = lm_head(spec, tokens, table, bias=True)
        self.pool = Linear(width, width) if pair else None
        self.pair = Linear(width, 2) if pair else None

    def forward(self, hidden: Tensor, targets: Tensor | None = None, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
        """Logits (…, V) of hidden states (…, E), or their cross-entropy with `targets`, as `LMHead`."""
        return self.vocabulary(self.norm(self.activation(self.transform(hidden))), targets, **options)

    def pairs(self, hidden_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) → (B, 2): class 0 says that the second segment follows the first."""
        if self.pool is None or self.pair is None:
            raise ConfigError("this masked-LM head has no second output: build it with head.pair = true")
        return self.pair(torch.tanh(self.pool(pool(hidden_BTE, mask, "first"))))
