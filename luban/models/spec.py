"""A model as data, layer by layer: frozen, serialisable, checked when it is made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from luban.core.artifact import write_json
from luban.core.config import from_dict, to_dict
from luban.core.errors import ArtifactError, ConfigError, problem
from luban.models.base import Body
from luban.models.decoder import DecoderBody
from luban.models.head.base import Head
from luban.models.head.language_model import LanguageModel
from luban.models.layer import LayerSpec
from luban.nn.init import Initialisation, NormalInit
from luban.nn.norm import Norm
from luban.nn.position.base import Position
from luban.nn.position.rope import Rope

SPEC = "spec.json"
DEPTH = 6  # layers, unless said otherwise
FORMAT = 2  # of spec.json; 1 described all layers by one set of parts
LAYER_FIELDS = {f.name for f in dataclasses.fields(LayerSpec)}


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model's shape. The defaults are LLaMA's parts at a size for a laptop."""

    vocab_size: int = 4096  # V, token ids, special tokens included
    width: int = 256  # E, of the residual stream
    context: int = 2048  # longest sequence in tokens
    layers: tuple[LayerSpec, ...] = (LayerSpec(),) * DEPTH  # of the decoder, or of an encoder alone
    encoder: tuple[LayerSpec, ...] = ()  # of an encoder–decoder's encoder
    position: Position = field(default_factory=Rope)  # where a token stands; a layer may have another
    embedding_norm: Norm | None = None  # of the embeddings, positions added (BLOOM, BERT); none: left as they are
    body: Body = field(default_factory=DecoderBody)  # what stands between tokens and hidden states
    head: Head = field(default_factory=LanguageModel)  # what is read off the hidden states
    tied_head: bool = False  # whether the output layer's weight is the embedding's
    init: Initialisation = field(default_factory=NormalInit)  # of a model trained from scratch

    def __post_init__(self):
        for name in ("vocab_size", "width", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model {name} must be at least 1, {getattr(self, name)} given")
        for name in ("layers", "encoder"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.body.check(self)
        self.head.check(self)

    @property
    def last(self) -> LayerSpec:
        """The last layer: its norm is that of the stack's end too, and of heads that normalise."""
        return self.layers[-1]

    @cached_property
    def parameters(self) -> int:
        """Scalars in the model, by arithmetic."""
        from luban.models.describe import describe

        return describe(self, batch=1, seq=1).parameters


def uniform(*, layers: int | None = None, encoder_layers: int | None = None, **fields: Any) -> ModelSpec:
    """A model whose layers are alike. Fields of `LayerSpec` (mixer, feedforward, norm, arrangement, …) describe each
    layer, the others are those of `ModelSpec`.

    Args:
        layers: None: `DEPTH`.
        encoder_layers: of an encoder–decoder's encoder; None: as many as the decoder has.

    Raises:
        ConfigError: layers of a body that isn't made of them, or parts that don't fit.
    """
    for name, count in (("layers", layers), ("encoder_layers", encoder_layers)):
        if count is not None and count < 1:
            raise ConfigError(f"model {name} must be at least 1, {count} given")
    own, parts = _sorted(fields)
    layer, body = LayerSpec(**parts), own.get("body", DecoderBody())
    if not body.stacked:
        for name in ("layers", *parts) if layers is not None else parts:
            raise ConfigError(
                f"a body of type {body.registry.name_of(type(body))} has no {name}: it is not made of Transformer "
                "layers; what it is made of are fields of the body"
            )
        return ModelSpec(layers=(), **own)
    layers = DEPTH if layers is None else layers
    if not body.two_sided:
        return ModelSpec(layers=(layer,) * layers, **own)
    encoder = (layer,) * (encoder_layers or layers)
    return ModelSpec(layers=(dataclasses.replace(layer, cross=True),) * layers, encoder=encoder, **own)


def changed(
    spec: ModelSpec,
    *,
    layers: int | Sequence[LayerSpec] | None = None,
    encoder_layers: int | None = None,
    **fields: Any,
) -> ModelSpec:
    """`spec` with other fields; those of `LayerSpec` change every layer, and a number of layers repeats the pattern of
    those there are. An encoder as deep as the decoder stays so unless `encoder_layers` says otherwise."""
    own, parts = _sorted(fields)
    alike = len(spec.encoder) == len(spec.layers) and isinstance(layers, int)
    depth = layers if encoder_layers is None and alike else encoder_layers
    made = repeated(spec.layers, layers) if isinstance(layers, int) else layers or spec.layers
    encoder = spec.encoder if depth is None else repeated(spec.encoder, depth)  # type: ignore[arg-type]
    return dataclasses.replace(
        spec,
        layers=tuple(dataclasses.replace(layer, **parts) for layer in made),
        encoder=tuple(dataclasses.replace(layer, **parts) for layer in encoder),
        **own,
    )


def _sorted(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(fields of ModelSpec, fields of LayerSpec)."""
    own = {name: value for name, value in fields.items() if name not in LAYER_FIELDS or name == "position"}
    return own, {name: value for name, value in fields.items() if name not in own}


def repeated(layers: Sequence[LayerSpec], count: int) -> tuple[LayerSpec, ...]:
    """`count` layers that go on with the pattern of these: its shortest period, or the last layer where it has none."""
    size = len(layers)
    period = next(p for p in range(1, size + 1) if all(layers[i] == layers[i % p] for i in range(size)))
    if period == size > 1:
        return tuple(layers[min(i, size - 1)] for i in range(count))
    return tuple(layers[i % period] for i in range(count))


def spec_to_dict(spec: ModelSpec) -> dict[str, Any]:
    """Plain data as in spec.json: the distinct layers, and for each layer which of them it is."""
    packed = {name: _pack(getattr(spec, name)) for name in ("layers", "encoder")}
    return {"format": FORMAT, **to_dict(spec), **packed}


def spec_from_dict(data: dict[str, Any], where: str = SPEC) -> ModelSpec:
    """The inverse. Raises ConfigError for data of another form."""
    data = dict(data)
    written = data.pop("format", 1)
    if isinstance(written, int) and written > FORMAT:
        raise ConfigError(
            f"{where} has format {written}, of a newer Luban; this version reads format {FORMAT}: upgrade it, or train or "
            "import the model again with this version"
        )
    if written != FORMAT:
        raise ConfigError(
            f"{where} was written by Luban before 0.2, which described all layers by one set of parts: "
            "train or import the model again with this version"
        )
    layers = {name: _unpack(data.pop(name), f"{where}: {name}") for name in ("layers", "encoder")}
    return from_dict(ModelSpec, {**data, **layers}, where)


def _pack(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    distinct = list(dict.fromkeys(layers))
    return {"distinct": to_dict(distinct), "index": [distinct.index(layer) for layer in layers]}


def _unpack(data: dict[str, Any], where: str) -> tuple[LayerSpec, ...]:
    distinct = [from_dict(LayerSpec, layer, f"{where}.distinct[{i}]") for i, layer in enumerate(data["distinct"])]
    return tuple(distinct[i] for i in data["index"])


def write_spec(spec: ModelSpec, folder: Path) -> None:
    """Write `spec.json` into `folder`."""
    write_json(folder / SPEC, spec_to_dict(spec))


def read_spec(folder: Path) -> ModelSpec:
    """The specification in `folder`. Raises ArtifactError where there is none or it can't be read."""
    try:
        return spec_from_dict(json.loads((folder / SPEC).read_text(encoding="utf-8")), str(folder / SPEC))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no {SPEC}: it is not a model of Luban's") from None
    except ConfigError as error:
        raise ArtifactError(str(error)) from None
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ArtifactError(f"{folder / SPEC} is damaged: {problem(error)}") from None
