"""Heads: what is read off the hidden states.

B batch, T tokens, E width of the hidden states, W width of the embedding table, V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.opgraph import Op, linear_op
from luban.core.registry import Registry, Variant
from luban.nn.row import multiply

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec

Pooling = Literal["first", "last", "mean"]  # which states stand for the row: one real token's, or the mean of all


@dataclass(frozen=True, kw_only=True)
class Head(Variant):
    """A family of heads. Its module is called as `readout(hidden, table, mask)`."""

    registry: ClassVar[Registry] = Registry(
        "head",
        {
            "language_model": "luban.models.head:LanguageModel",
            "masked_lm": "luban.models.head:MaskedLM",
            "classes": "luban.models.head:Classes",
            "token_classes": "luban.models.head:TokenClasses",
            "span": "luban.models.head:Span",
            "value": "luban.models.head:Value",
            "hidden": "luban.models.head:Hidden",
        },
    )

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        raise NotImplementedError

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """What it does to a batch."""
        raise NotImplementedError


def vocabulary_op(spec: ModelSpec, tokens: int, width: int, *, bias: bool) -> Op:
    """The product with the output table, whose parameters are the embedding's where they are tied."""
    op = linear_op("readout", tokens, width, spec.vocab_size)
    own = (0 if spec.tied_head else op.parameters) + (spec.vocab_size if bias else 0)
    return Op(name=op.name, kind=op.kind, flops=op.flops, parameters=own, activation=op.activation,
              sides=op.sides)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LanguageModel(Head):
    """One linear layer to the vocabulary, or the embedding table itself: (…, E) → (…, V)."""

    bias: bool = False  # a bias a token
    scale_hidden: bool = False  # divide the hidden states by √E first (T5, whose embeddings aren't scaled down)

    def build(self, spec: ModelSpec) -> nn.Module:
        """The layer."""
        layer = vocabulary_layer(spec, spec.body.hidden_width(spec), bias=self.bias)
        return Scaled(layer, spec.body.hidden_width(spec) ** -0.5) if self.scale_hidden else layer

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """One product."""
        return [vocabulary_op(spec, batch * seq, spec.body.hidden_width(spec), bias=self.bias)]


def vocabulary_layer(spec: ModelSpec, width: int, *, bias: bool) -> nn.Module:
    """The product with a table of its own, or with the embedding's. Raises ConfigError where the widths differ."""
    if not spec.tied_head:
        return OwnTable(width, spec.vocab_size, bias=bias)
    if width != spec.body.table_width(spec):
        raise ConfigError(f"the head can't be tied: it reads {width} numbers a token, "
                          f"the embedding table has {spec.body.table_width(spec)}")  # fmt: skip
    return EmbeddingTable(spec.vocab_size, bias=bias)


Product = tuple[Tensor, Tensor, Tensor | None]  # rows (…, W), weight (V, W), bias (V,): what logits are made of


class OwnTable(nn.Linear):
    """hidden · weightᵀ (+ bias)."""

    def product(self, hidden: Tensor, table: Tensor) -> Product:
        """What its logits are the product of."""
        return hidden, self.weight, self.bias

    def forward(self, hidden: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) → (…, V)."""
        return multiply(hidden, self.weight, self.bias)


class EmbeddingTable(nn.Module):
    """hidden · tableᵀ (+ bias)."""

    def __init__(self, vocab: int, *, bias: bool):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab)) if bias else None

    def product(self, hidden: Tensor, table: Tensor) -> Product:
        """What its logits are the product of."""
        return hidden, table, self.bias

    def forward(self, hidden: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) → (…, V)."""
        return multiply(hidden, table, self.bias)


class Scaled(nn.Module):
    """A vocabulary layer on scaled hidden states."""

    def __init__(self, layer: nn.Module, factor: float):
        super().__init__()
        self.layer, self.factor = layer, factor

    def product(self, hidden: Tensor, table: Tensor) -> Product:
        """What its logits are the product of."""
        return self.layer.product(hidden * self.factor, table)

    def forward(self, hidden: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) → (…, V)."""
        return self.layer(hidden * self.factor, table)


@dataclass(frozen=True, kw_only=True)
class MaskedLM(Head):
    """BERT's: a dense layer, the feed-forward's activation, a norm, then the vocabulary with a bias a token.

    With `pair` there is a second output on the pooled first token, `module.pairs(hidden)` → (B, 2): whether a
    pair of segments belongs together (Devlin et al. 2019, section 3.1; Lan et al. 2020, section 3.1).
    """

    pair: bool = False  # the second output

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return MaskedLMReadout(spec, pair=self.pair)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """Transform, norm, vocabulary; for pairs the pooler and two classes."""
        tokens, width, table = batch * seq, spec.body.hidden_width(spec), spec.body.table_width(spec)
        ops = [linear_op("readout.transform", tokens, width, table, bias=True),
               spec.norm.op("readout.norm", tokens, table), vocabulary_op(spec, tokens, table, bias=True)]  # fmt: skip
        if self.pair:
            ops += [linear_op("readout.pool", batch, width, width, bias=True),
                    linear_op("readout.pair", batch, width, 2, bias=True)]  # fmt: skip
        return ops


class MaskedLMReadout(nn.Module):
    """vocabulary(norm(activation(transform(hidden))))."""

    def __init__(self, spec: ModelSpec, *, pair: bool):
        super().__init__()
        width, table = spec.body.hidden_width(spec), spec.body.table_width(spec)
        self.transform = nn.Linear(width, table)
        self.activation = type(spec.feedforward).activation
        self.norm = spec.norm.build(table)
        self.vocabulary = vocabulary_layer(spec, table, bias=True)
        self.pool = nn.Linear(width, width) if pair else None
        self.pair = nn.Linear(width, 2) if pair else None

    def product(self, hidden: Tensor, table: Tensor) -> Product:
        """What its logits are the product of."""
        return self.vocabulary.product(self.norm(self.activation(self.transform(hidden))), table)

    def forward(self, hidden: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) → (…, V)."""
        return self.vocabulary(self.norm(self.activation(self.transform(hidden))), table)

    def pairs(self, hidden_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) → (B, 2): class 0 says that the second segment follows the first."""
        if self.pool is None:
            raise ConfigError("this masked-LM head has no second output: build it with head.pair = true")
        return self.pair(torch.tanh(self.pool(pool(hidden_BTE, mask, "first"))))


@dataclass(frozen=True, kw_only=True)
class Classes(Head):
    """Classes of a whole row: (B, T, E) → (B, C)."""

    count: int = 2  # C
    pooling: Pooling = "first"  # whose state is read
    dense: bool = True  # a dense layer and tanh before the classes (BERT's pooler)
    bias: bool = True  # of the classes

    def __post_init__(self):
        if self.count < 1:
            raise ConfigError(f"head count must be at least 1, {self.count} given")

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return RowReadout(spec.body.hidden_width(spec), self.count, self.pooling, dense=self.dense, bias=self.bias)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """The products."""
        width = spec.body.hidden_width(spec)
        dense = [linear_op("readout.pool", batch, width, width, bias=True)] if self.dense else []
        return [*dense, linear_op("readout.output", batch, width, self.count, bias=self.bias)]


@dataclass(frozen=True, kw_only=True)
class Value(Head):
    """One number a row, a reward or value, read off its last real token: (B, T, E) → (B,)."""

    pooling: Pooling = "last"  # whose state is read
    bias: bool = True  # of the output

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return ValueReadout(spec.body.hidden_width(spec), 1, self.pooling, dense=False, bias=self.bias)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """One product a row."""
        return [linear_op("readout.output", batch, spec.body.hidden_width(spec), 1, bias=self.bias)]


class RowReadout(nn.Module):
    """output(tanh(pool(one state a row)))."""

    def __init__(self, width: int, count: int, pooling: Pooling, *, dense: bool, bias: bool):
        super().__init__()
        self.pooling = pooling
        self.pool = nn.Linear(width, width) if dense else None
        self.output = nn.Linear(width, count, bias=bias)

    def product(self, hidden: Tensor, table: Tensor) -> Product:
        """What a language model beside the classes multiplies, where the table is the output layer too (GPT-1)."""
        return hidden, table, None

    def forward(self, hidden_BTE: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) → (B, C)."""
        row_BE = pool(hidden_BTE, mask, self.pooling)
        return self.output(row_BE if self.pool is None else torch.tanh(self.pool(row_BE)))


class ValueReadout(RowReadout):
    """The same with one output."""

    def forward(self, hidden_BTE: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) → (B,)."""
        return super().forward(hidden_BTE, table, mask).squeeze(-1)


def pool(hidden_BTE: Tensor, mask: Tensor | None, how: Pooling) -> Tensor:
    """(B, E): the state of the first or last real token of each row, or the mean over all real ones."""
    if how == "mean":
        weights = torch.ones_like(hidden_BTE[..., :1]) if mask is None else mask[..., None].to(hidden_BTE.dtype)
        return (hidden_BTE * weights).sum(1) / weights.sum(1).clamp_min(1)
    if mask is None:
        return hidden_BTE[:, 0 if how == "first" else -1]
    slots = mask.long().argmax(-1) if how == "first" else mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
    return hidden_BTE[torch.arange(len(slots), device=slots.device), slots]


@dataclass(frozen=True, kw_only=True)
class TokenClasses(Head):
    """Classes of every token: (B, T, E) → (B, T, C)."""

    count: int = 2  # C

    def __post_init__(self):
        if self.count < 1:
            raise ConfigError(f"head count must be at least 1, {self.count} given")

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return TokenReadout(spec.body.hidden_width(spec), self.count)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """One product a token."""
        return [linear_op("readout.output", batch * seq, spec.body.hidden_width(spec), self.count, bias=True)]


@dataclass(frozen=True, kw_only=True)
class Span(Head):
    """Scores of every token as the first and as the last of an answer: (B, T, E) → (B, T, 2)."""

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return TokenReadout(spec.body.hidden_width(spec), 2)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """One product a token."""
        return [linear_op("readout.output", batch * seq, spec.body.hidden_width(spec), 2, bias=True)]


@dataclass(frozen=True, kw_only=True)
class Hidden(Head):
    """No head: the hidden states themselves, (B, T, E) → (B, T, E).

    With `pool` there is BERT's pooler beside them, `module.readout.pooled(hidden, mask)` → (B, E).
    """

    pool: bool = False  # the pooler

    def build(self, spec: ModelSpec) -> nn.Module:
        """The module."""
        return HiddenReadout(spec.body.hidden_width(spec), pool=self.pool)

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """The pooler, where there is one."""
        width = spec.body.hidden_width(spec)
        return [linear_op("readout.pool", batch, width, width, bias=True)] if self.pool else []


class HiddenReadout(nn.Module):
    """Nothing, and a pooler for those who ask."""

    def __init__(self, width: int, *, pool: bool):
        super().__init__()
        self.pool = nn.Linear(width, width) if pool else None

    def forward(self, hidden: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) as it came."""
        return hidden

    def pooled(self, hidden_BTE: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, T, E) → (B, E): tanh of a dense layer on each row's first token."""
        if self.pool is None:
            raise ConfigError("this model has no pooler: build it with head.pool = true")
        return torch.tanh(self.pool(pool(hidden_BTE, mask, "first")))


class TokenReadout(nn.Module):
    """output(hidden)."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.output = nn.Linear(width, count)

    def forward(self, hidden: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) → (…, C)."""
        return self.output(hidden)
