"""The family of bodies, what stands between token ids and the hidden states that a head reads, and what all models share.

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

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Body(Variant):
    """A family of bodies."""

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

    stacked: ClassVar[bool] = True  # made of the layers of the specification
    causal: ClassVar[bool] = False  # `module(tokens)` predicts at every token the next one, from those before it
    cached: ClassVar[bool] = False  # … and can do so token by token with a cache of keys and values
    two_sided: ClassVar[bool] = False  # reads a source with an encoder and writes a target with a decoder
    fixed_shapes: ClassVar[bool] = True  # what it computes doesn't depend on where documents end

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError where the body and the rest of the model don't go together."""

    def embedding_width(self, spec: ModelSpec) -> int:
        """Width of the token embeddings, which a tied output layer shares."""
        return spec.width

    def widens_embeddings(self) -> bool:
        """Whether a linear layer turns the embeddings into hidden states."""
        return False

    def hidden_width(self, spec: ModelSpec) -> int:
        """Width of the hidden states that the head reads."""
        return spec.width

    def decoder_start_ids(self) -> tuple[int, ...] | None:
        """Ids that a decoder of two sides starts with; None: it doesn't say, or has one side only."""
        return None

    def build(self, spec: ModelSpec) -> Model:
        """The module with its head."""
        raise NotImplementedError

    def describe(self, graph: GraphBuilder, spec: ModelSpec, batch: int, seq: int, target: int | None) -> GraphTensor:
        """Record what the body does to a batch, the head left out; the hidden states, (B, T, E).

        Args:
            target: tokens that an encoder–decoder's decoder reads; None: as many as the encoder.
        """
        raise NotImplementedError


def refuse_transformer_fields(spec: ModelSpec) -> None:
    """Raise ConfigError where a body that isn't made of Transformer layers is given fields of them."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(spec)}
    body = spec.body.registry.name_of(type(spec.body))
    for name in ("position", "embedding_norm"):
        if getattr(spec, name) != defaults[name]:
            raise ConfigError(
                f"a body of type {body} has no {name}, so nothing would come of model.{name}: leave it out"
            )
    if spec.layers or spec.encoder:
        raise ConfigError(
            f"a body of type {body} is not made of Transformer layers: say model.body.layers instead of "
            "model.layer and model.layers"
        )


def require_next_token(spec: ModelSpec, what: str, *, cached: bool = False) -> None:
    """Raise UnsupportedError unless this model predicts the next token (`cached`: step by step), as `what` needs."""
    body, head = (part.registry.name_of(type(part)) for part in (spec.body, spec.head))
    if not (spec.body.cached if cached else spec.body.causal) or head != "language_model":
        raise UnsupportedError(
            f"{what} needs a decoder with a language_model head; this model has body {body} and head {head}"
        )


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What a forward is given beside a cache."""

    tokens: Tensor  # (B, T) int64
    mask: Tensor | None = None  # (B, T) bool, true where a token is real
    documents: Tensor | None = None  # (B, T) int, a run of one number is a document
    positions: Tensor | None = None  # (B, T) or (1, T) int; None: counted
    segments: Tensor | None = None  # (B, T) int
    document_starts: Tensor | None = None  # (B, C) int32, where documents begin


class Model(nn.Module):
    """What all models share: a specification, and a head over the hidden states that `forward` gives on request."""

    head: Any  # a module: hidden states → what is read off them

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec

    def read(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the head makes of hidden states (B, T, E); `mask` (B, T) for heads that pool rows."""
        return self.head(hidden, mask=mask) if self.spec.head.pools else self.head(hidden)


class OneSidedModel(Model):
    """What all models of one side share: one signature."""

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
        output: Literal["logits", "hidden"] = "logits",
    ) -> Tensor:
        """What the head makes of every token (of every row, for heads that pool), or the hidden states that it reads.

        Args:
            tokens: (B, T) int64; (B, T, C) characters where words are made of them.
            mask: (B, T) bool, true where a token is real (padding may be left or right).
            documents: (B, T) int; nothing flows from one document into another. Not together with a cache.
            positions: (B, T) or (1, T) int; default: real tokens counted from 0, in each document. With a bias of
                distances fused kernels need them to rise by one from token to token, and give NaN where they don't.
            segments: (B, T) int. Decoders: tokens of segment 0 are a prefix that every token of their document sees
                (prefix LM, blank infilling); with a cache for the first forward alone. Encoders: rows of the segment
                table. Recurrent bodies: tokens of segment 0 are the input, the answer is read off the others.
            document_starts: (B, C) int32, the slots at which `documents` begin, each row filled up with T. Redundant
                with `documents` and not validated; lets kernels for packed documents skip a device-to-host sync.
            cache: keys and values of earlier tokens; it takes up the new ones.
            attention: how attention is computed; default: by the fastest kernel that can serve.
            output: "hidden" for (B, T, E) hidden states.

        Returns:
            (B, T, V) logits of a language model. Those at padding mean nothing.

        Raises:
            DataError: an argument that this body has no use for.
        """
        given = ModelInput(
            tokens=tokens,
            mask=mask,
            documents=documents,
            positions=positions,
            segments=segments,
            document_starts=document_starts,
        )
        hidden = self.hidden_states(given, cache, attention)
        return hidden if output == "hidden" else self.read(hidden, mask)

    def hidden_states(self, given: ModelInput, cache: KVCache | None, attention: AttentionBackend | None) -> Tensor:
        """(B, T, E)."""
        raise NotImplementedError


def attention_backend(cache: KVCache | None, attention: AttentionBackend | None) -> AttentionBackend:
    """The backend of a forward."""
    if cache is not None:
        return CachedAttention(cache, None if attention is None else attention.kernel)
    return AttentionBackend() if attention is None else attention
