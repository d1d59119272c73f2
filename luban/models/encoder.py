"""The bidirectional encoder (BERT, RoBERTa, ALBERT).

B batch, T tokens, E model width, W embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KVCache
from luban.models.base import Body, ModelInput, OneSidedModel, attention_backend
from luban.models.stack import TransformerStack, forward_context, input_embedding
from luban.models.stack_checks import check_layers, position_shape
from luban.models.stack_graph import describe_stack
from luban.nn.attention.backend import AttentionBackend

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class EncoderBody(Body):
    """A stack with bidirectional attention; embeddings can be narrower than the model."""

    segments: int = 0  # number of segment ids, each with an embedding (BERT: 2; 0: no segment embedding)
    embeddings: int | None = None  # W, followed by a linear layer to E (Lan et al. 2020); none: E, no layer

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError if the layers or sizes don't fit."""
        if self.segments < 0 or (self.embeddings is not None and self.embeddings < 1):
            raise ConfigError("segments must be at least 0 and embeddings at least 1")
        check_layers(spec, spec.layers, causal=False)

    def embedding_width(self, spec: ModelSpec) -> int:
        """W."""
        return spec.width if self.embeddings is None else self.embeddings

    def widens_embeddings(self) -> bool:
        """True if W is given, even if it equals E."""
        return self.embeddings is not None

    def build(self, spec: ModelSpec) -> Encoder:
        """The module with its head."""
        return Encoder(spec)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """Record the stack, (B, T) token ids → (B, T, E)."""
        tokens_BT = graph.input("tokens", (batch, seq))
        return describe_stack(
            graph.scope("encoder"), spec, spec.layers, tokens_BT, causal=False, segments=self.segments
        )


class Encoder(OneSidedModel):
    """A bidirectional encoder: TransformerStack and head."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        assert isinstance(spec.body, EncoderBody)
        embedding = input_embedding(spec, segments=spec.body.segments)
        self.encoder = TransformerStack(
            dict(enumerate(spec.layers)),
            depth=len(spec.layers),
            spec=spec,
            shape=position_shape(spec, spec.layers, causal=False),
            embedding=embedding,
        )
        self.head = spec.head.build(spec, embedding.tokens)

    def hidden_states(self, given: ModelInput, cache: KVCache | None, attention: AttentionBackend | None) -> Tensor:
        """Hidden states (B, T, E). Raises DataError for a cache, or for segments without a segment embedding."""
        if cache is not None:
            raise DataError("an encoder can't generate token by token, because its tokens attend to later ones")
        ctx = forward_context(
            self.encoder,
            given.tokens,
            given.mask,
            given.positions,
            attention_backend(None, attention),
            documents=given.documents,
            routing=given.routing,
        )
        return self.encoder(given.tokens, ctx, given.segments)
