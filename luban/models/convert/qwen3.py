"""Qwen 3, dense (`model_type = "qwen3"`): LLaMA with every query and key normalised over its head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from luban.models.convert.fields import Fields
from luban.models.convert.llama import Llama, grouped
from luban.models.convert.qwen2 import layer_window_fields, layer_windows
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import RMSNorm

HEAD_DIM = 128  # where config.json doesn't say


class Qwen3(Llama):
    """Query-key RMSNorm with the model's own eps."""

    model_type: ClassVar[str] = "qwen3"
    name: ClassVar[str] = "Qwen3"
    default_context: ClassVar[int] = 32_768

    def attention(self, fields: Fields) -> Grouped:
        """Queries and keys normalised."""
        bias = fields.get("attention_bias", False)
        norm = RMSNorm(eps=fields.get("rms_norm_eps", 1e-6))
        attention = grouped(fields, qkv_bias=bias, output_bias=bias, qk_norm=norm)
        return replace(attention, head_dim=fields.get("head_dim", HEAD_DIM))

    def fits(self, attention: Grouped) -> bool:
        """RMSNorm on queries and keys."""
        biased = attention.qkv_bias == attention.output_bias
        return isinstance(attention.qk_norm, RMSNorm) and biased

    def own(self, attention: Grouped) -> dict[str, Any]:
        """Biases."""
        return {"attention_bias": attention.qkv_bias}

    def windows(self, fields: Fields) -> list[int | None]:
        """Where config.json asks for them."""
        return layer_windows(fields)

    def window_fields(self, windows: list[int | None]) -> dict[str, Any] | None:
        """One window for some layers or all."""
        return layer_window_fields(windows)
