"""Heads that read every token: classes, and the ends of answers.

B batch, T tokens, E width of the hidden states, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.models.head.base import Head
from luban.nn.linear import Linear

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class TokenClasses(Head):
    """Classes of every token: (B, T, E) → (B, T, C)."""

    count: int = 2  # C

    def __post_init__(self):
        if self.count < 1:
            raise ConfigError(f"head count must be at least 1, {self.count} given")

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module."""
        return TokenHead(spec.body.hidden_width(spec), self.count)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """One matmul a token."""
        graph.linear("output", hidden, self.count, bias=True)


@dataclass(frozen=True, kw_only=True)
class Span(Head):
    """Scores of every token as the first and as the last of an answer: (B, T, E) → (B, T, 2)."""

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module."""
        return TokenHead(spec.body.hidden_width(spec), 2)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """One matmul a token."""
        graph.linear("output", hidden, 2, bias=True)


class TokenHead(nn.Module):
    """output(hidden)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.output = Linear(width, count)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, E) → (…, C)."""
        return self.output(hidden)
