"""BERT's head: a linear layer, an activation, a norm, then the vocabulary with a bias a token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, linear_op
from luban.models.head.base import Head, check_tied, lm_head, lm_head_op, pool
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

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Transform, norm, vocabulary; for pairs the pooler and two classes."""
        tokens, width, table = batch * seq, spec.body.hidden_width(spec), spec.body.embedding_width(spec)
        ops = [
            linear_op("head.transform", tokens, width, table, bias=True),
            spec.last.norm.op("head.norm", tokens, table),
            lm_head_op(spec, tokens, table, bias=True, name="head.vocabulary"),
        ]
        if self.pair:
            ops += [
                linear_op("head.pool", batch, width, width, bias=True),
                linear_op("head.pair", batch, width, 2, bias=True),
            ]
        return ops


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
