"""Base config of model heads.

B batch, T tokens, E width of the hidden states, W embedding width, V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.registry import Registry, Variant
from luban.nn.embedding import Embedding
from luban.nn.lm_head import LMHead

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec

Pooling = Literal["first", "last", "mean"]  # hidden state of a row: that of one real token, or the mean of all


@dataclass(frozen=True, kw_only=True)
class Head(Variant):
    """Base config of model heads (registry `head`). The module is called as `head(hidden)`, or as
    `head(hidden, mask=mask)` if it pools rows."""

    registry: ClassVar[Registry] = Registry(
        "head",
        {
            "language_model": "luban.models.head.language_model:LanguageModel",
            "masked_lm": "luban.models.head.masked_lm:MaskedLM",
            "classes": "luban.models.head.rows:Classes",
            "token_classes": "luban.models.head.tokens:TokenClasses",
            "span": "luban.models.head.tokens:Span",
            "value": "luban.models.head.rows:Value",
            "hidden": "luban.models.head.hidden:Hidden",
            "multitask": "luban.models.head.multitask:MultitaskHead",
        },
    )
    pools: ClassVar[bool] = False  # whether it reads whole rows, and so which tokens are real

    @property
    def main(self) -> Head:
        """The head that the model's forward reads: this one, or the first of several."""
        return self

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError where the head doesn't fit the model."""

    def build(self, spec: ModelSpec, tokens: nn.Module) -> nn.Module:
        """The module; `tokens`: the model's token embedding, whose weight a tied output layer shares."""
        raise NotImplementedError

    def describe(self, graph: GraphBuilder, spec: ModelSpec, hidden: GraphTensor) -> None:
        """Record what it makes of hidden states (B, T, E); `graph` is the scope of the head's module."""
        raise NotImplementedError


def lm_head(spec: ModelSpec, tokens: nn.Module, width: int, *, bias: bool, scale: float = 1.0) -> LMHead:
    """The output layer over the vocabulary, for hidden states of `width`."""
    tied = tokens if spec.tied_head else None
    assert tied is None or isinstance(tied, Embedding)
    return LMHead(width, spec.vocab_size, bias=bias, tied=tied, scale=scale)


def check_tied(spec: ModelSpec, width: int) -> None:
    """Raise ConfigError where an output layer that reads `width` numbers can't share the embedding's weight."""
    if spec.tied_head and width != spec.body.embedding_width(spec):
        raise ConfigError(
            f"the head can't be tied: it reads {width} numbers a token, "
            f"the embedding has {spec.body.embedding_width(spec)}"
        )


def describe_lm_head(
    graph: GraphBuilder, name: str, spec: ModelSpec, hidden: GraphTensor, *, bias: bool
) -> GraphTensor:
    """Record the matmul with the output weight, whose parameters are the embedding's where they are tied."""
    return graph.linear(name, hidden, spec.vocab_size, role="lm_head", bias=bias, kind="lm_head", tied=spec.tied_head)


def one_token(hidden: GraphTensor) -> GraphTensor:
    """(B, T, E) → (B, E), as `pool` gives out."""
    return hidden.view(hidden.shape[0], hidden.shape[-1])


def pool(hidden_BTE: Tensor, mask: Tensor | None, how: Pooling) -> Tensor:
    """(B, E): the state of the first or last real token of each row, or the mean over all real ones."""
    if how == "mean":
        weights = torch.ones_like(hidden_BTE[..., :1]) if mask is None else mask[..., None].to(hidden_BTE.dtype)
        return (hidden_BTE * weights).sum(1) / weights.sum(1).clamp_min(1)
    if mask is None:
        return hidden_BTE[:, 0 if how == "first" else -1]
    slots = mask.long().argmax(-1) if how == "first" else mask.shape[1] - 1 - mask.flip(-1).long().argmax(-1)
    return hidden_BTE[torch.arange(len(slots), device=slots.device), slots]
