"""A model as recipes describe it: `[model]`, one `[model.layer]`, patterns that change some layers.

[model]
preset = "luban-6m"            # or from the defaults
layers = 12

[model.layer]
mixer = { window = 256 }

[[model.pattern]]              # every second layer sees everything
every = 2
offset = 1
mixer = { window = "none" }
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from luban.core.config import from_dict, merge, to_dict, without_defaults
from luban.core.errors import ConfigError
from luban.models.base import Body
from luban.models.decoder import DecoderBody
from luban.models.head.base import Head
from luban.models.head.language_model import LanguageModel
from luban.models.layer import LayerSpec
from luban.models.presets import preset
from luban.models.spec import DEPTH, ModelSpec, repeated
from luban.nn.init import Initialisation, NormalInit
from luban.nn.norm import Norm
from luban.nn.position.base import Position
from luban.nn.position.rope import Rope

PATTERN_FIELDS = ("every", "offset", "at")
STACK_FIELDS = ("layers", "layer", "pattern")
LAYERS = ("layers", "encoder")  # fields of a ModelSpec


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """The layers of an encoder–decoder's encoder."""

    layers: int = DEPTH  # how many; a preset's pattern is repeated
    layer: LayerSpec = field(default_factory=LayerSpec)  # every layer
    pattern: tuple[dict[str, Any], ...] = ()  # changes to some layers: every and offset, or at, and fields of layer


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that a recipe trains."""

    preset: str = ""  # start from this model (luban.models.presets); the other fields change it
    vocab_size: int = 4096  # token ids, special tokens included; left out: the data's
    width: int = 256  # of the residual stream
    context: int = 2048  # longest sequence in tokens
    layers: int = DEPTH  # how many; a preset's pattern is repeated
    layer: LayerSpec = field(default_factory=LayerSpec)  # every layer
    pattern: tuple[dict[str, Any], ...] = ()  # changes to some layers: every and offset, or at, and fields of layer
    encoder: StackConfig | None = None  # the encoder of an encoder–decoder; none: layers like the decoder's
    position: Position = field(default_factory=Rope)  # where a token stands
    embedding_norm: Norm | None = None  # of the embeddings, positions added; none: left as they are
    body: Body = field(default_factory=DecoderBody)  # what stands between tokens and hidden states
    head: Head = field(default_factory=LanguageModel)  # what is read off the hidden states
    tied_head: bool = False  # whether the output layer's weight is the embedding's
    init: Initialisation = field(default_factory=NormalInit)  # of a model trained from scratch

    @staticmethod
    def filled(given: Mapping[str, Any]) -> dict[str, Any]:
        """Fields with those of the preset that they change, if they name one that there is and can be changed so."""
        if not given.get("preset"):
            return dict(given)
        with contextlib.suppress(ConfigError):
            size = given.get("vocab_size") or preset(str(given["preset"])).vocab_size
            found = config_of(resolve_spec(given, int(size)))
            return {"preset": given["preset"], **{k: v for k, v in found.items() if k != "vocab_size" or k in given}}
        return dict(given)


def resolve_spec(given: Mapping[str, Any], vocab_size: int) -> ModelSpec:
    """The ModelSpec that `[model]` describes, for data with this vocabulary.

    Args:
        given: fields of `ModelConfig`; one that leaves `vocab_size` out takes the data's.

    Raises:
        ConfigError: an unknown preset or field, or another vocabulary than the data's.
    """
    fields = {key: value for key, value in given.items() if key not in ("preset", "encoder", *STACK_FIELDS)}
    base = preset(str(given["preset"])) if given.get("preset") else None
    if base is not None:
        row = without_defaults(base)
        fields = merge({key: value for key, value in row.items() if key not in ("vocab_size", *LAYERS)}, fields)
    fields = {"vocab_size": vocab_size, **fields}
    body = from_dict(_Body, {"body": fields["body"]} if "body" in fields else {}, "model").body
    spec = from_dict(ModelSpec, fields | _stacks(given, base, body), "model")
    if spec.vocab_size != vocab_size:
        raise ConfigError(
            f"model.vocab_size is {spec.vocab_size}, but the shards' tokenizer has {vocab_size} tokens: "
            "leave it out of the recipe, or pack the shards with the right tokenizer"
        )
    return spec


@dataclass(frozen=True, kw_only=True)
class _Body:
    body: Body = field(default_factory=DecoderBody)


def _stacks(given: Mapping[str, Any], base: ModelSpec | None, body: Body) -> dict[str, tuple[LayerSpec, ...]]:
    """The layers of the model and, where it has one, of its encoder."""
    if not body.stacked:
        if any(key in given for key in (*STACK_FIELDS, "encoder")):
            raise ConfigError(
                f"a body of type {body.registry.name_of(type(body))} is not made of Transformer layers: say "
                "model.body.layers instead of model.layers, and leave out model.layer"
            )
        return dict.fromkeys(LAYERS, ())
    layers = _stack(given, base.layers if base else (), "model", cross=body.two_sided)
    if not body.two_sided:
        if given.get("encoder"):
            raise ConfigError(
                f"model.encoder is of encoder–decoders, and this model's body is {body.registry.name_of(type(body))}: change "
                "model.layer, or choose model.body.type encoder_decoder"
            )
        return {"layers": layers, "encoder": ()}
    table = given.get("encoder") or {key: value for key, value in given.items() if key in STACK_FIELDS}
    return {"layers": layers, "encoder": _stack(table, base.encoder if base else (), "model.encoder", cross=False)}


def _stack(table: Mapping[str, Any], base: Sequence[LayerSpec], where: str, *, cross: bool) -> tuple[LayerSpec, ...]:
    """The layers that `layers`, `layer` and `pattern` of a table describe, or make of those of a preset."""
    count = from_dict(StackConfig, {"layers": table.get("layers", len(base) or DEPTH)}, where).layers
    if count < 1:
        raise ConfigError(f"{where}.layers must be at least 1, {count} given")
    one = table.get("layer") or {}
    if base:
        layers = [_changed(layer, one, f"{where}.layer") for layer in repeated(base, count)]
    else:
        layers = [from_dict(LayerSpec, one, f"{where}.layer")] * count
    pattern: Sequence[Mapping[str, Any]] = table.get("pattern") or ()
    for number, row in enumerate(pattern):
        name = f"{where}.pattern[{number}]"
        changes = {key: value for key, value in row.items() if key not in PATTERN_FIELDS}
        for index in _places(row, count, name):
            layers[index] = _changed(layers[index], changes, name)
    if not cross and any(layer.cross for layer in layers):
        raise ConfigError(
            f"{where}: only layers of an encoder–decoder's decoder read an encoder (cross), and all of them do"
        )
    return tuple(replace(layer, cross=cross) for layer in layers)


def _changed(layer: LayerSpec, changes: Mapping[str, Any], where: str) -> LayerSpec:
    return from_dict(LayerSpec, merge(without_defaults(layer), dict(changes)), where) if changes else layer


def _places(row: Mapping[str, Any], count: int, where: str) -> list[int]:
    """Which layers a row of the pattern changes."""
    if ("at" in row) == ("every" in row):
        raise ConfigError(f"{where} needs either every (and offset) or at, to say which layers it changes")
    if "at" in row:
        places = [int(place) for place in row["at"]]
        if any(not 0 <= place < count for place in places):
            raise ConfigError(f"{where}.at names layers from 0 to {count - 1}, {places} given")
        return places
    every, offset = int(row["every"]), int(row.get("offset", 0))
    if every < 1 or not 0 <= offset < every:
        raise ConfigError(
            f"{where}: every must be at least 1 and offset from 0 to every − 1, {every} and {offset} given"
        )
    return list(range(offset, count, every))


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """Fields of `ModelConfig` that describe `spec`, the inverse of `resolve_spec`: what a run writes into its recipe."""
    names = [field.name for field in dataclasses.fields(spec) if field.name not in LAYERS]
    plain = {name: to_dict(getattr(spec, name)) for name in names}
    if spec.layers:
        plain |= _table(spec.layers)
    if spec.encoder:
        plain["encoder"] = _table(spec.encoder)
    return plain


def _table(layers: Sequence[LayerSpec]) -> dict[str, Any]:
    common = max(dict.fromkeys(layers), key=list(layers).count)
    distinct = [layer for layer in dict.fromkeys(layers) if layer != common]
    rows = [
        {"at": [i for i, other in enumerate(layers) if other == layer], **_difference(layer, common)}
        for layer in distinct
    ]
    table = {"layers": len(layers), "layer": {k: v for k, v in to_dict(common).items() if k != "cross"}}
    return table | ({"pattern": rows} if rows else {})


def _difference(layer: LayerSpec, common: LayerSpec) -> dict[str, Any]:
    ours, theirs = to_dict(layer), to_dict(common)
    return {name: _explicit(ours[name]) for name in ours if ours[name] != theirs[name]}


def _explicit(value: Any) -> Any:
    """With "none" for None, which TOML can't say: a row of a pattern must be able to take something away."""
    if isinstance(value, dict):
        return {key: _explicit(item) for key, item in value.items()}
    return "none" if value is None else value
