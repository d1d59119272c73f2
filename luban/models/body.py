"""The family of bodies: what stands between token ids and the hidden states that a head reads."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from luban.core.errors import ConfigError, UnsupportedError
from luban.core.opgraph import Op
from luban.core.registry import Registry, Variant

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

    causal: ClassVar[bool] = False  # `module(tokens)` says of every place what comes next, from what is before it
    cached: ClassVar[bool] = False  # … and does so token by token with a cache of keys and values

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError where the body and the rest of the model don't go together."""
        spec.attention.check(spec.width)
        spec.position.check(spec.position_shape)

    def table_width(self, spec: ModelSpec) -> int:
        """Width of the embedding table, which a tied output layer shares."""
        return spec.width

    def hidden_width(self, spec: ModelSpec) -> int:
        """Width of the hidden states that the head reads."""
        return spec.width

    def build(self, spec: ModelSpec) -> BodyModule:
        """The module with its head."""
        raise NotImplementedError

    def ops(self, spec: ModelSpec, batch: int, seq: int) -> list[Op]:
        """What the body does to a batch, the head left out."""
        raise NotImplementedError


TRANSFORMER_PARTS = ("position", "attention", "block", "embedding_norm")


def refuse_parts_of_transformers(spec: ModelSpec) -> None:
    """Raise ConfigError where a body that has no Transformer's parts is given one that isn't the default."""
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(spec)}
    for name in TRANSFORMER_PARTS:
        if getattr(spec, name) != defaults[name]:
            body = spec.body.registry.name_of(type(spec.body))
            raise ConfigError(
                f"a body of type {body} has no {name}, so nothing would come of model.{name}: leave it out"
            )


def require_next_token(spec: ModelSpec, what: str, *, cached: bool = False) -> None:
    """Raise UnsupportedError unless this model predicts the next token (`cached`: step by step), as `what` needs."""
    body, head = (part.registry.name_of(type(part)) for part in (spec.body, spec.head))
    if not (spec.body.cached if cached else spec.body.causal) or head != "language_model":
        raise UnsupportedError(
            f"{what} needs a decoder with a language_model head; this model has body {body} and head {head}"
        )


class BodyModule(nn.Module):
    """What all bodies share: a specification, an embedding table and a head over the hidden states."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.spec = spec

    @property
    def table(self) -> Tensor | None:
        """(V, W) the embedding table; none where words are made otherwise."""
        return getattr(self.embedding, "weight", None)

    def head(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """(…, E) hidden states → what the head makes of them; `mask` (B, T) for heads that read whole rows."""
        return self.readout(hidden, self.table, mask)

    def vocabulary_product(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows (…, W), weight (V, W) and bias (V,) whose product are the logits of a head over the vocabulary."""
        return self.readout.product(hidden, self.table)
