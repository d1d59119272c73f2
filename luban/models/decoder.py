"""The causal decoder.

B batch, T new tokens, E model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luban.core.errors import DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KVCache
from luban.models.base import Body, ModelInput, OneSidedModel, attention_backend
from luban.models.stack import (
    TransformerStack,
    check_layers,
    describe_stack,
    forward_context,
    input_embedding,
    position_shape,
)
from luban.nn.attention.backend import AttentionBackend

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class DecoderBody(Body):
    """Layers in which a token sees itself and those before it."""

    causal = True
    cached = True

    def check(self, spec: ModelSpec) -> None:
        """Layers that fit."""
        check_layers(spec, spec.layers, causal=True)

    def build(self, spec: ModelSpec) -> Decoder:
        """The module with its head."""
        return Decoder(spec)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """One stack."""
        tokens_BT = graph.input("tokens", (batch, seq))
        return describe_stack(graph.scope("decoder"), spec, spec.layers, tokens_BT, causal=True)


class Decoder(OneSidedModel):
    """A stack and a head."""

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
        self.windows, self.layouts = any(s.window for s in shapes), any(s.layout for s in shapes)

    def hidden_states(self, given: ModelInput, cache: KVCache | None, attention: AttentionBackend | None) -> Tensor:
        """(B, T, E). Raises DataError for documents or segments that can't go with the cache, or segments with a
        block-sparse layout."""
        self._check(given, cache)
        prefix = None if given.segments is None else given.segments == 0
        ctx = forward_context(
            self.decoder,
            given.tokens,
            given.mask,
            given.positions,
            attention_backend(cache, attention),
            documents=given.documents,
            document_starts=given.document_starts,
            prefix=prefix,
        )
        return self.decoder(given.tokens, ctx)

    def _check(self, given: ModelInput, cache: KVCache | None) -> None:
        if given.segments is not None and self.layouts:
            raise DataError(
                "a block-sparse layout knows no prefix that all tokens see: leave out segments, or the mixer's layout"
            )
        if cache is None:
            return
        if given.documents is not None:
            raise DataError("a cache holds one document a row: leave out documents, or leave out the cache")
        if given.segments is not None and cache.positions.shape[-1]:
            raise DataError("segments are for the first forward of a cache: what follows sees the prefix anyway")
        if given.segments is not None and self.windows:
            raise DataError(
                "a model with attention windows can't continue a prefix with a cache, since later "
                "tokens would no longer see it: leave out the cache"
            )
