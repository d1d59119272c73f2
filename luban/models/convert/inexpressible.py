"""Why no foreign format expresses a model: the smallest change with which one would."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from luban.core.errors import ConfigError
from luban.core.registry import Variant
from luban.models.arrangement.parallel import Parallel
from luban.models.arrangement.post import PostNorm
from luban.models.arrangement.pre import PreNorm
from luban.models.head.language_model import LanguageModel
from luban.models.head.masked_lm import MaskedLM
from luban.models.spec import ModelSpec, changed
from luban.nn.feedforward.gated import SwiGLU, TanhGEGLU
from luban.nn.feedforward.plain import GELU, ReLU, TanhGELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.alibi import Alibi
from luban.nn.position.learned import Learned
from luban.nn.position.rope import Rope
from luban.nn.position.t5 import RelativeBias

MOST = 3  # parts that are changed at once
Named = tuple[str, Any]  # a field of ModelSpec or LayerSpec, and its new value


def reason(spec: ModelSpec, format_of: Callable[[ModelSpec], str | None]) -> str:
    """Which parts of `spec` have no counterpart, with those that would have one.

    Args:
        format_of: the name of a format that expresses a specification, or None.
    """
    if not spec.body.stacked:
        return f"its body, {_kind(spec.body)}, is not made of Transformer layers"
    alternatives = list(_alternatives(spec))
    for count in range(1, MOST + 1):
        for several in itertools.combinations(alternatives, count):
            if len({name for name, _ in several}) < count:
                continue
            try:
                found = format_of(_with(spec, several))
            except ConfigError:
                continue
            if found is not None:
                parts = " and ".join(_difference(spec, name, value) for name, value in several)
                return f"{parts}, as a {found} has"
    return f"more than {MOST} of its parts have no counterpart in any"


def _alternatives(spec: ModelSpec) -> Iterator[Named]:
    """Values of each part that some format has."""
    layer, norm = spec.layers[0], spec.layers[0].norm
    width, heads = layer.feedforward.width, getattr(layer.mixer, "heads", 1)
    if len(set(spec.layers)) > 1 or len(set(spec.encoder)) > 1:
        yield "layers", len(spec.layers)
    yield from (("position", position) for position in (Rope(), Learned(), Alibi(), RelativeBias()))
    yield from (("norm", kind(eps=norm.eps)) for kind in (RMSNorm, LayerNorm))
    yield from (("arrangement", kind()) for kind in (PreNorm, PostNorm, Parallel))
    yield from (("feedforward", kind(width=width)) for kind in (SwiGLU, TanhGEGLU, ReLU))
    yield from (("feedforward", kind(width=width, bias=True)) for kind in (GELU, TanhGELU, ReLU))
    kept = {"heads": heads, "kv_heads": getattr(layer.mixer, "kv_heads", None)}
    for mixer in (Grouped(**kept), Grouped(heads=heads), Grouped(heads=heads, head_dim=64, score_scale=1.0)):
        yield "mixer", mixer
    yield "mixer", Grouped(heads=heads, qkv_bias=True, output_bias=True)
    yield "mixer", Grouped(heads=heads, kv_heads=heads, qkv_bias=True, output_bias=True)
    yield "embedding_norm", norm if spec.embedding_norm is None else None
    if hasattr(spec.head, "bias"):
        yield "head", dataclasses.replace(spec.head, bias=not spec.head.bias)  # type: ignore[call-arg]
    yield from (("head", head) for head in (LanguageModel(), MaskedLM()))
    yield "tied_head", not spec.tied_head


def _with(spec: ModelSpec, changes: tuple[Named, ...]) -> ModelSpec:
    """The specification with these parts."""
    named = dict(changes)
    if named.pop("layers", None):
        one = dataclasses.replace(spec.layers[0], share=None, position=None)
        encoder = tuple(dataclasses.replace(spec.encoder[0], share=None, position=None) for _ in spec.encoder)
        spec = dataclasses.replace(spec, layers=(one,) * len(spec.layers), encoder=encoder)
    return changed(spec, **named)


def _difference(spec: ModelSpec, name: str, value: Any) -> str:
    """The value of the field `name` here, and the value that a format would need."""
    if name == "layers":
        return "its layers differ instead of being alike"
    mine = getattr(spec, name) if hasattr(spec, name) else getattr(spec.layers[0], name)
    if type(mine) is not type(value) or not isinstance(mine, Variant):
        return f"its {name} is {_kind(mine)} instead of {_kind(value)}"
    fields = [f.name for f in dataclasses.fields(mine) if getattr(mine, f.name) != getattr(value, f.name)]  # type: ignore[arg-type]
    told = ", ".join(f"{field} = {getattr(mine, field)} instead of {getattr(value, field)}" for field in fields)
    return f"its {name} has {told}" if told else f"its {name} differs from layer to layer"


def _kind(part: Any) -> str:
    return part.registry.name_of(type(part)) if isinstance(part, Variant) else str(part)
