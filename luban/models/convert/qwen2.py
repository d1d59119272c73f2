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
        """Windows in only some layers aren't built, so they are refused."""
        fields.only("use_sliding_window", False)
        return grouped(fields, qkv_bias=True)

    def fits(self, attention: Grouped) -> bool:
        """Exactly those biases."""
        plain = attention.qk_norm is None and attention.window is None
        return plain and attention.qkv_bias and not attention.output_bias

    def own(self, attention: Grouped) -> dict[str, Any]:
        """Nothing: the biases go without saying."""
        return {"use_sliding_window": False}
