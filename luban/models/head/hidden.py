"""No head: the hidden states themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.models.head.base import Head, one_token, pool
from luban.nn.linear import Linear

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Hidden(Head):
    """(B, T, E) → (B, T, E).

    With `pool` there is BERT's pooler beside them, `module.head.pooled(hidden, mask)` → (B, E).
    """

    pool: bool = False  # the pooler

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module."""
        return HiddenHead(spec.body.hidden_width(spec), pool=self.pool)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """The pooler, where there is one."""
        if self.pool:
            graph.linear("pool", one_token(hidden), hidden.shape[-1], bias=True)


class HiddenHead(nn.Module):
    """The identity, and a pooler."""

    def __init__(self, width: int, *, pool: bool):
        super().__init__()
        self.pool = Linear(width, width) if pool else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, T, E) as it came."""
        return hidden

    def pooled(self, hidden_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) → (B, E): tanh of a linear layer on each row's first token."""
        if self.pool is None:
            raise ConfigError("this model has no pooler: build it with head.pool = true")
        return torch.tanh(self.pool(pool(hidden_BTE, mask, "first")))
