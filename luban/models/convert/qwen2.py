"""Qwen 1.5, 2 and 2.5 (`model_type = "qwen2"`): LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any, ClassVar

from luban.models.convert.fields import Fields
from luban.models.convert.llama import Llama, grouped
from luban.nn.mixer.grouped import Grouped


class Qwen2(Llama):
    """Biases on queries, keys and values, none on the output."""

    model_type: ClassVar[str] = "qwen2"
    name: ClassVar[str] = "Qwen2"
    default_context: ClassVar[int] = 32_768

    def attention(self, fields: Fields) -> Grouped:
        """Biases on queries, keys and values."""
        return grouped(fields, qkv_bias=True)

    def windows(self, fields: Fields) -> list[int | None]:
        """Where config.json asks for them."""
        return layer_windows(fields)

    def window_fields(self, windows: list[int | None]) -> dict[str, Any] | None:
        """One window for some layers or all."""
        return layer_window_fields(windows)

    def fits(self, attention: Grouped) -> bool:
        """Exactly those biases."""
        return attention.qk_norm is None and attention.qkv_bias and not attention.output_bias

    def own(self, attention: Grouped) -> dict[str, Any]:
        """The biases go without saying."""
        return {}


SLIDING, FULL = "sliding_attention", "full_attention"


def layer_windows(fields: Fields) -> list[int | None]:
    """The window of every layer: of those that `layer_types` names, or those from `max_window_layers` on."""
    size, layers = fields.values.get("sliding_window", 4096), fields.need("num_hidden_layers")
    first = fields.get("max_window_layers", 28)
    kinds = fields.get("layer_types", [SLIDING if layer >= first else FULL for layer in range(layers)])
    if not fields.get("use_sliding_window", False) or size is None:
        return [None] * layers
    return [size if kind == SLIDING else None for kind in kinds]


def layer_window_fields(windows: list[int | None]) -> dict[str, Any] | None:
    """The fields of config.json, or None for windows of several sizes."""
    sizes = {window for window in windows if window is not None}
    if not sizes:
        return {"use_sliding_window": False}
    kinds = [FULL if window is None else SLIDING for window in windows]
    fields = {"use_sliding_window": True, "sliding_window": min(sizes), "layer_types": kinds}
    return fields if len(sizes) == 1 else None
