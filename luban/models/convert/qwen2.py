"""Qwen 1.5, 2 and 2.5 (`model_type = "qwen2"`): LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

from luban.models.convert.family import Fields
from luban.models.convert.llama import Llama, grouped
from luban.nn.attention.grouped import Grouped


class Qwen2(Llama):
    """Biases on queries, keys and values, none on the output."""

    model_type: ClassVar[str] = "qwen2"
    name: ClassVar[str] = "Qwen2"
    default_context: ClassVar[int] = 32_768

    def attention(self, fields: Fields) -> Grouped:
        """Windows where config.json asks for them."""
        return grouped(fields, qkv_bias=True, **windows(fields))

    def fits(self, attention: Grouped) -> bool:
        """Exactly those biases."""
        return attention.qk_norm is None and attention.qkv_bias and not attention.output_bias

    def own(self, attention: Grouped, layers: int) -> dict[str, Any]:
        """Windows; the biases go without saying."""
        return window_fields(attention, layers)


SLIDING, FULL = "sliding_attention", "full_attention"


def windows(fields: Fields) -> dict[str, Any]:
    """Our fields `window` and `windowed`: the layers that `layer_types` names, or those from `max_window_layers` on."""
    size = fields.values.get("sliding_window", 4096)
    if not fields.get("use_sliding_window", False) or size is None:
        return {}
    layers, first = fields.need("num_hidden_layers"), fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types", [SLIDING if layer >= first else FULL for layer in range(layers)])
    held = tuple(kind == SLIDING for kind in kinds)
    return {"window": size, "windowed": (True,) if all(held) else held} if any(held) else {}


def window_fields(attention: Grouped, layers: int) -> dict[str, Any]:
    """The fields of config.json."""
    if attention.window is None:
        return {"use_sliding_window": False}
    kinds = [FULL if attention.limits_of(layer).window is None else SLIDING for layer in range(layers)]
    return {"use_sliding_window": True, "sliding_window": attention.window, "layer_types": kinds}
