"""The causal decoder.

B batch, T new tokens, E model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from luban.core.errors import DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KeysValues, KVCache
from luban.models.base import Body, ModelInput, OneSidedModel, attention_backend
from luban.models.stack import TransformerStack, forward_context, input_embedding
from luban.models.stack_checks import check_layers, position_shape
from luban.models.stack_graph import describe_stack
from luban.nn.attention.backend import AttentionBackend

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class DecoderBody(Body):
    """A stack with causal attention."""

    causal = True
    cached = True

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError if the layers don't fit."""
        check_layers(spec, spec.layers, causal=True)

    def build(self, spec: ModelSpec) -> Decoder:
        """The module with its head."""
        return Decoder(spec)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """Record the stack, (B, T) token ids → (B, T, E)."""
        tokens_BT = graph.input("tokens", (batch, seq))
        return describe_stack(graph.scope("decoder"), spec, spec.layers, tokens_BT, causal=True)


class Prompts(nn.Module):
    """Base class of keys and values that precede every text that a decoder reads."""

    runs_layers: ClassVar[bool] = False  # its forward runs the decoder's layers

    def forward(self, decoder: Decoder) -> Mapping[int, KeysValues]:
        """Layer → keys and values (1, K, P, D) of the prompt's P tokens."""
        raise NotImplementedError


class Decoder(OneSidedModel):
    """A causal decoder: TransformerStack and head."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        embedding = input_embedding(spec)
        self.decoder = TransformerStack(
            dict(enumerate(spec.layers)),
            depth=len(spec.layers),
            spec=spec,
            shape=position_shape(spec, spec.layers, causal=True),
            embedding=embedding,
        )
        self.head = spec.head.build(spec, embedding.tokens)
        shapes = [group.shape for group in self.decoder.groups]
        self.prompts: Prompts | None = None
        self.windows, self.layouts = any(s.window for s in shapes), any(s.layout for s in shapes)

    def add_prompts(self, prompts: Prompts) -> None:
        """Put an adapter's keys and values before every text."""
        self.prompts = prompts

    def hidden_states(self, given: ModelInput, cache: KVCache | None, attention: AttentionBackend | None) -> Tensor:
        """Hidden states (B, T, E). Raises DataError for documents or segments that the cache doesn't support, and for
        segments with a block-sparse layout."""
        self._check(given, cache)
        prefix = None if given.segments is None else given.segments == 0
        prefixes = None if self.prompts is None else self.prompts(self)
        ctx = forward_context(
            self.decoder,
            given.tokens,
            given.mask,
            given.positions,
            attention_backend(cache, attention),
            documents=given.documents,
            document_starts=given.document_starts,
            prefix=prefix,
            routing=given.routing,
            prefixes=prefixes,
        )
        return self.decoder(given.tokens, ctx)

    def _check(self, given: ModelInput, cache: KVCache | None) -> None:
        if given.segments is not None and self.layouts:
            raise DataError("block-sparse layouts don't support prefix segments: drop `segments` or the mixer's layout")
        if cache is None:
            return
        if given.documents is not None:
            raise DataError("a cache holds one document a row: drop `documents` or the cache")
        if given.segments is not None and cache.positions.shape[-1]:
            raise DataError("later tokens attend to the prefix already; pass segments only on a cache's first forward")
        if given.segments is not None and self.windows:
            raise DataError(
                "a model with attention windows can't continue a prefix with a cache, since later tokens would no longer "
                "attend to it: drop the cache"
            )
