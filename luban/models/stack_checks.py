"""Whether the layers of a stack fit each other and the model, and the sizes that position methods get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from luban.core.errors import ConfigError
from luban.models.layer import LayerSpec
from luban.nn.position.base import PositionShape
from luban.nn.position.rope import Rope

if TYPE_CHECKING:
    from luban.models.spec import ModelSpec


def position_shape(spec: ModelSpec, layers: Sequence[LayerSpec], *, causal: bool) -> PositionShape:
    """Sizes for the model's position method. Raises ConfigError if the layers that use it differ in heads or head dim."""
    shapes = {a[:1] + a[2:3] for layer in layers if layer.position is None and (a := layer.mixer.attention(spec.width))}
    if len(shapes) > 1:
        raise ConfigError(
            f"layers with {' and '.join(f'{h} heads of {d}' for h, d in sorted(shapes))} can't share the model's "
            "position method: give some of them a position method of their own (model.pattern … position)"
        )
    heads, head_dim = next(iter(shapes), (1, spec.width))
    return PositionShape(
        width=spec.body.embedding_width(spec), heads=heads, head_dim=head_dim, context=spec.context, causal=causal
    )


def layer_position_shape(spec: ModelSpec, layer: LayerSpec, shape: PositionShape) -> PositionShape:
    """Sizes for the position method of one layer: the stack's `shape` with the layer's own heads."""
    attention = layer.mixer.attention(spec.width)
    return shape if attention is None else replace(shape, heads=attention.heads, head_dim=attention.head_dim)


def check_layers(spec: ModelSpec, layers: Sequence[LayerSpec], *, causal: bool, cross: bool = False) -> None:
    """Raise ConfigError if the layers of a stack don't fit each other or the model.

    Args:
        cross: the stack cross-attends to an encoder.
    """
    if not layers:
        raise ConfigError("a stack needs at least 1 layer: model.layers")
    for index, layer in enumerate(layers):
        layer.mixer.check(spec.width)
        layer.arrangement.check(layer)
        if reason := layer.mixer.refusal(causal=causal, cross=layer.cross):
            raise ConfigError(
                f"layer {index} can't have the mixer {layer.mixer.registry.name_of(type(layer.mixer))}: {reason}"
            )
        if layer.cross != cross:
            raise ConfigError(
                "cross = true is only for the decoder of an encoder–decoder, where all layers must have it"
            )
        if layer.position is not None and layer.position.embeds:
            name = layer.position.registry.name_of(type(layer.position))
            raise ConfigError(
                f"layer {index} can't have {name} positions of its own, because they are added to the token embeddings: "
                "set them for the whole model (model.position)"
            )
        if layer.share is not None:
            first = layers[layer.share] if layer.share < index else None
            if first is None or first.share is not None or replace(layer, share=None) != first:
                raise ConfigError(
                    f"layer {index} shares the parameters of layer {layer.share}, which must be an earlier layer with the "
                    "same settings that doesn't itself share another's"
                )
    shape = position_shape(spec, layers, causal=causal)
    spec.position.check(shape)
    for layer in layers:
        if layer.position is not None and layer.mixer.attention(spec.width):
            layer.position.check(layer_position_shape(spec, layer, shape))
    for index, layer in enumerate(layers):
        _check_position(index, layer, spec, layer_position_shape(spec, layer, shape))
    if (
        spec.position != Rope()
        and not spec.position.embeds
        and not any(la.mixer.attention(spec.width) for la in layers)
    ):
        name = spec.position.registry.name_of(type(spec.position))
        if name != "none":
            raise ConfigError(
                f"no layer attends, so {name} positions would have no effect: leave model.position out, or use learned or "
                "sinusoidal ones, which are added to the embeddings"
            )


def _check_position(index: int, layer: LayerSpec, spec: ModelSpec, shape: PositionShape) -> None:
    """Raise ConfigError where a layer's mixer can't apply its position method, or its arrangement can't train it."""
    mixer, position = layer.mixer, layer.position or spec.position
    if layer.arrangement.reversible and not position.embeds and position.parameters(shape):
        name = position.registry.name_of(type(position))
        raise ConfigError(
            f"layer {index} is reversible, so that the parameters of {name} positions would get no gradient: use rope, alibi, "
            "learned or sinusoidal"
        )
    name, method = (part.registry.name_of(type(part)) for part in (mixer, position))
    if mixer.attention(spec.width) is None:
        if layer.position is not None:
            raise ConfigError(f"layer {index} has the mixer {name}, on which {method} positions would have no effect")
        return
    if mixer.biased:
        return
    with torch.device("meta"):
        biased = position.build(shape).biased
    if biased:
        raise ConfigError(
            f"layer {index} has the mixer {name}, which adds no bias to its scores, so {method} positions don't go with it: "
            "use rope, learned, sinusoidal or none"
        )
