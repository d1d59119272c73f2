"""The encoder–decoder (the original Transformer, BART, T5).

B batch, S source tokens, T decoder tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from luban.core.errors import ConfigError, DataError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KVCache
from luban.models.base import Body, Model, attention_backend
from luban.models.stack import TransformerStack, forward_context, input_embedding
from luban.models.stack_checks import check_layers, position_shape
from luban.models.stack_graph import describe_stack
from luban.nn.attention.backend import AttentionBackend
from luban.nn.attention.prepared_mask import compute_dtype
from luban.nn.context import EncoderStates
from luban.nn.embedding import Embedding
from luban.nn.moe.layer import MixtureOfExperts

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class EncoderDecoderBody(Body):
    """An encoder over the source and a decoder over the target, with one embedding weight for both."""

    two_sided = True
    decoder_start: int | None = None  # id of the token that the decoder begins with; none: it can't generate text
    decoder_second: int | None = None  # id of the token that always follows it (forced begin); none: it is predicted

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError if the layers don't fit or a start id is outside the vocabulary."""
        check_layers(spec, spec.encoder, causal=False)
        check_layers(spec, spec.layers, causal=True, cross=True)
        for name in ("decoder_start", "decoder_second"):
            if (token := getattr(self, name)) is not None and not 0 <= token < spec.vocab_size:
                raise ConfigError(f"{name} must be a token id below {spec.vocab_size}, {token} given")
        for layer in (*spec.encoder, *spec.layers):
            if isinstance(layer.feedforward, MixtureOfExperts):
                raise ConfigError("encoder–decoders don't support mixtures of experts: use a decoder or an encoder")

    def decoder_start_ids(self) -> tuple[int, ...] | None:
        """Ids of the start token and, if it is fixed, of the second token."""
        ids = [token for token in (self.decoder_start, self.decoder_second) if token is not None]
        return None if self.decoder_start is None else tuple(ids)

    def build(self, spec: ModelSpec) -> EncoderDecoder:
        """The module with its head."""
        return EncoderDecoder(spec)

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """Record both stacks: (B, seq) encoder tokens, (B, target) decoder tokens → (B, target, E)."""
        tokens_BS = graph.input("tokens", (batch, seq))
        decoder_tokens_BT = graph.input("decoder_tokens", (batch, seq if target is None else target))
        states_BSE = describe_stack(graph.scope("encoder"), spec, spec.encoder, tokens_BS, causal=False)
        decoder = graph.scope("decoder")
        return describe_stack(
            decoder, spec, spec.layers, decoder_tokens_BT, causal=True, states_BSE=states_BSE, shared_tokens=True
        )


class EncoderDecoder(Model):
    """Two stacks that share their token embeddings, and a head on the decoder's."""

    def __init__(self, spec: ModelSpec):
        super().__init__(spec)
        tokens = Embedding(spec.vocab_size, spec.width)
        self.encoder = TransformerStack(
            dict(enumerate(spec.encoder)),
            depth=len(spec.encoder),
            spec=spec,
            shape=position_shape(spec, spec.encoder, causal=False),
            embedding=input_embedding(spec, tokens),
        )
        self.decoder = TransformerStack(
            dict(enumerate(spec.layers)),
            depth=len(spec.layers),
            spec=spec,
            shape=position_shape(spec, spec.layers, causal=True),
            embedding=input_embedding(spec, tokens),
        )
        self.head = spec.head.build(spec, tokens)

    def encode(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        attention: AttentionBackend | None = None,
    ) -> EncoderStates:
        """Encoder states of source tokens (B, S), for the decoder's cross-attention.

        Args:
            mask: (B, S) bool, false where padding; None: no padding.
            positions: (B, S) or (1, S); default: from 0, padding not counted.
        """
        ctx = forward_context(self.encoder, tokens, mask, positions, attention_backend(None, attention))
        states_BSE = self.encoder(tokens, ctx)
        return EncoderStates(states_BSE, mask, compute_dtype(states_BSE))

    def forward(
        self,
        tokens: Tensor | None,
        decoder_tokens: Tensor,
        mask: Tensor | None = None,
        *,
        decoder_mask: Tensor | None = None,
        documents: None = None,
        positions: Tensor | None = None,
        segments: None = None,
        cache: KVCache | None = None,
        encoder_states: EncoderStates | None = None,
        attention: AttentionBackend | None = None,
        output: Literal["logits", "hidden"] = "logits",
    ) -> Tensor:
        """Logits of the next target token at every decoder token, or the decoder's hidden states.

        Args:
            tokens: (B, S) int64, the source; ignored if `encoder_states` are given.
            decoder_tokens: (B, T) int64, the target so far; with a cache only its new tokens.
            mask: (B, S) bool, false where a source token is padding.
            decoder_mask: (B, T) bool, false where a target token is padding.
            documents, segments: must be None, since every row is one source and one target; DataError otherwise.
            positions: (B, T) or (1, T) of the decoder; default: from 0, padding not counted.
            cache: keys and values of the decoder's earlier tokens, and of the source.
            encoder_states: the result of `encode`, for decoding step by step.
            attention: how attention is computed; default: the fastest kernel that supports the case.

        Returns:
            (B, T, V) logits or (B, T, E) hidden states.
        """
        if documents is not None or segments is not None:
            raise DataError(
                "an encoder–decoder reads one source and one target a row: it takes no documents or segments"
            )
        if encoder_states is None:
            assert tokens is not None
            encoder_states = self.encode(tokens, mask, attention=attention)
        ctx = forward_context(
            self.decoder,
            decoder_tokens,
            decoder_mask,
            positions,
            attention_backend(cache, attention),
            encoder=encoder_states,
        )
        hidden = self.decoder(decoder_tokens, ctx)
        return hidden if output == "hidden" else self.read(hidden, decoder_mask)
