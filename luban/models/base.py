"""Base config of model bodies (token ids → hidden states) and base classes of models.

B batch, T tokens, E model width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from luban.core.errors import ConfigError, UnsupportedError
from luban.core.graph_builder import GraphBuilder
from luban.core.opgraph import GraphTensor
from luban.core.protocols import KVCache
from luban.core.registry import Registry, Variant
from luban.nn.attention.backend import AttentionBackend, CachedAttention
from luban.nn.context import RouterTraining

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Body(Variant):
    """Base config of model bodies (registry `body`)."""

    registry: ClassVar[Registry] = Registry(
        "body",
        {
            "decoder": "luban.models.decoder:DecoderBody",
            "encoder": "luban.models.encoder:EncoderBody",
            "encoder_decoder": "luban.models.encoder_decoder:EncoderDecoderBody",
            "recurrent": "luban.models.recurrent:RecurrentBody",
            "elmo": "luban.models.elmo:ElmoBody",
        },
    )

    stacked: ClassVar[bool] = True  # built from the specification's `layers`
    causal: ClassVar[bool] = False  # `module(tokens)` predicts each next token from the tokens before it
    cached: ClassVar[bool] = False  # … and supports a KV cache
    two_sided: ClassVar[bool] = False  # encoder–decoder: separate source and target tokens
    fixed_shapes: ClassVar[bool] = True  # tensor shapes inside don't depend on where documents end

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError if the body doesn't fit the rest of the model."""

    def embedding_width(self, spec: ModelSpec) -> int:
        """Width of the token embeddings, which a tied output layer shares."""
        return spec.width

    def widens_embeddings(self) -> bool:
        """True if a linear layer projects the embeddings to the model's width."""
        return False

    def hidden_width(self, spec: ModelSpec) -> int:
        """Width of the hidden states that the head reads."""
        return spec.width

    def decoder_start_ids(self) -> tuple[int, ...] | None:
        """Ids that an encoder–decoder's decoder starts with; None: not set, or no encoder–decoder."""
        return None

    def build(self, spec: ModelSpec) -> Model:
        """The module with its head."""
        raise NotImplementedError

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """Record the body's operations without the head; returns the hidden states, (B, T, E).

        Args:
            target: tokens that an encoder–decoder's decoder reads; None: as many as the encoder.
        """
        raise NotImplementedError


def refuse_transformer_fields(spec: ModelSpec) -> None:
    """Raise ConfigError if fields of Transformer layers are set for a body without Transformer layers."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(spec)}
    body = spec.body.registry.name_of(type(spec.body))
    for name in ("position", "embedding_norm"):
        if getattr(spec, name) != defaults[name]:
            raise ConfigError(
                f"a body of type {body} has no {name}, so model.{name} would have no effect: leave it out"
            )
    if spec.layers or spec.encoder:
        raise ConfigError(
            f"a body of type {body} has no Transformer layers: set model.body.layers instead of "
            "model.layer and model.layers"
        )


def require_next_token(spec: ModelSpec, what: str, *, cached: bool = False) -> None:
    """Raise UnsupportedError unless this model predicts the next token (`cached`: step by step), as `what` needs."""
    body, head = (part.registry.name_of(type(part)) for part in (spec.body, spec.head.main))
    if not (spec.body.cached if cached else spec.body.causal) or head != "language_model":
        raise UnsupportedError(
            f"{what} needs a decoder with a language_model head; this model has body {body} and head {head}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """Inputs of a forward, without the cache."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor | None = None  # (B, T) bool, false where padding
    documents: Tensor | None = None  # (B, T) int, each run of equal numbers is a document
    positions: Tensor | None = None  # (B, T) or (1, T) int; None: from 0 in each document, padding not counted
    segments: Tensor | None = None  # (B, T) int, segment ids
    document_starts: Tensor | None = None  # (B, C) int32, slots at which documents begin
    routing: RouterTraining | None = None  # what routers of experts need in training


class Model(nn.Module):
    """Base class of models: a specification and a head on the hidden states."""

    head: Any  # a module: hidden states → logits or whatever the head returns

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec

    def read(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The head's output for hidden states (B, T, E); `mask` (B, T) bool, for heads that pool rows."""
        return self.head(hidden, mask=mask) if self.spec.head.pools else self.head(hidden)


class OneSidedModel(Model):
    """Base class of models other than encoder–decoders: one signature of `forward`."""

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
        document_starts: Tensor | None = None,
        cache: KVCache | None = None,
        attention: AttentionBackend | None = None,
        routing: RouterTraining | None = None,
        output: Literal["logits", "hidden"] = "logits",
    ) -> Tensor:
        """The head's output for each token (for each row, if the head pools), or the hidden states.

        Args:
            tokens: (B, T) int64; (B, T, C) character ids for a body that reads characters.
            mask: (B, T) bool, false where padding (left or right).
            documents: (B, T) int; tokens attend only within their document. Not together with a cache.
            positions: (B, T) or (1, T) int; default: from 0 in each document, padding not counted. With a distance
                bias, fused kernels need positions that rise by one per token; otherwise their output is NaN.
            segments: (B, T) int. Decoders: tokens of segment 0 are a prefix visible to every token of their document
                (prefix LM, blank infilling); with a cache only on its first forward. Encoders: ids of the segment
                embedding. Recurrent bodies: tokens of segment 0 are the input, the others are the answer.
            document_starts: (B, C) int32, the slots at which `documents` begin, each row padded with T. Redundant
                with `documents` and not validated; lets kernels for packed documents skip a device-to-host sync.
            cache: keys and values of earlier tokens; the new ones are appended.
            attention: how attention is computed; default: the fastest kernel that supports the case.
            routing: what routers of experts need in training; None outside of it.
            output: "hidden" for (B, T, E) hidden states.

        Returns:
            (B, T, V) logits of a language model. Those at padding are undefined.

        Raises:
            DataError: an argument that this body doesn't support.
        """
        given = ModelInput(
            tokens=tokens,
            mask=mask,
            documents=documents,
            positions=positions,
            segments=segments,
            document_starts=document_starts,
            routing=routing,
        )
        hidden = self.hidden_states(given, cache, attention)
        return hidden if output == "hidden" else self.read(hidden, mask)

    def hidden_states(self, given: ModelInput, cache: KVCache | None, attention: AttentionBackend | None) -> Tensor:
        """Hidden states (B, T, E)."""
        raise NotImplementedError


def attention_backend(cache: KVCache | None, attention: AttentionBackend | None) -> AttentionBackend:
    """The given backend, or a cached one if there is a cache."""
    if cache is not None:
        return CachedAttention(cache, None if attention is None else attention.kernel)
    return AttentionBackend() if attention is None else attention
