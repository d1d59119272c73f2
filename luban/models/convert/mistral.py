"""Mistral 7B and its kin (`model_type = "mistral"`): LLaMA with a sliding window."""

from __future__ import annotations

from typing import Any, ClassVar

from luban.models.convert.family import Fields
from luban.models.convert.llama import Llama, grouped
from luban.nn.attention.grouped import Grouped


class Mistral(Llama):
    """No biases; a token sees itself and the window − 1 before it (none: all)."""

    model_type: ClassVar[str] = "mistral"
    name: ClassVar[str] = "Mistral"
    span_prefix: ClassVar[str] = "model."
    default_context: ClassVar[int] = 131_072

    def attention(self, fields: Fields) -> Grouped:
        """Absent means 4,096, null means no window."""
        return grouped(fields, window=fields.values.get("sliding_window", 4096))

    def fits(self, attention: Grouped) -> bool:
        """Without biases and norms."""
        plain = attention.qk_norm is None and not attention.qkv_bias and not attention.output_bias
        return plain and all(attention.windowed)

    def own(self, attention: Grouped, layers: int) -> dict[str, Any]:
        """The window."""
        return {"sliding_window": attention.window}
