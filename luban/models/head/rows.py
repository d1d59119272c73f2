"""Heads that read one state a row: classes, and a reward or value.

B batch, T tokens, E width of the hidden states, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.models.head.base import Head, Pooling, check_tied, lm_head, one_token, pool
from luban.nn.linear import Linear

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Classes(Head):
    """Classes of a whole row: (B, T, E) → (B, C).

    A tied model is a language model too, with the embedding as output layer: `module.head.language_model` (GPT-1).
    """

    pools = True
    count: int = 2  # C
    pooling: Pooling = "first"  # whose state is read
    dense: bool = True  # a linear layer and tanh before the classes (BERT's pooler)
    bias: bool = True  # of the classes

    def __post_init__(self):
        if self.count < 1:
            raise ConfigError(f"head count must be at least 1, {self.count} given")

    def check(self, spec: ModelSpec) -> None:
        """A language model beside the classes reads the embedding's width."""
        check_tied(spec, spec.body.hidden_width(spec))

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module."""
        width = spec.body.hidden_width(spec)
        head = RowHead(width, self.count, self.pooling, dense=self.dense, bias=self.bias)
        if spec.tied_head:
            head.language_model = lm_head(spec, tokens, width, bias=False)
        return head

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """One matmul a row, or two."""
        row_BE = one_token(hidden)
        if self.dense:
            row_BE = graph.linear("pool", row_BE, hidden.shape[-1], bias=True)
        graph.linear("output", row_BE, self.count, bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class Value(Head):
    """One number a row, a reward or value, read off its last real token: (B, T, E) → (B,).

    A tied model is a language model too, as with `Classes`.
    """

    pools = True
    pooling: Pooling = "last"  # whose state is read
    bias: bool = True  # of the output

    def check(self, spec: ModelSpec) -> None:
        """A language model beside the value reads the embedding's width."""
        check_tied(spec, spec.body.hidden_width(spec))

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module."""
        width = spec.body.hidden_width(spec)
        head = ValueHead(width, 1, self.pooling, dense=False, bias=self.bias)
        if spec.tied_head:
            head.language_model = lm_head(spec, tokens, width, bias=False)
        return head

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """One matmul a row."""
        graph.linear("output", one_token(hidden), 1, bias=self.bias)


class RowHead(nn.Module):
    """output(tanh(pool(one state a row)))."""

    def __init__(self, width: int, count: int, pooling: Pooling, *, dense: bool, bias: bool):
        super().__init__()
        self.pooling: Pooling = pooling
        self.pool = Linear(width, width) if dense else None
        self.output = Linear(width, count, bias=bias)
        self.language_model: nn.Module | None = None

    def forward(self, hidden_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E), and (B, T) true where a token is real → (B, C)."""
        row_BE = pool(hidden_BTE, mask, self.pooling)
        return self.output(row_BE if self.pool is None else torch.tanh(self.pool(row_BE)))


class ValueHead(RowHead):
    """The same with one output."""

    def forward(self, hidden_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E), and (B, T) true where a token is real → (B,)."""
        return super().forward(hidden_BTE, mask).squeeze(-1)
