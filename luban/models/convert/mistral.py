"""Mistral 7B and its kin (`model_type = "mistral"`): LLaMA with a sliding window."""

from __future__ import annotations

from typing import Any, ClassVar

from luban.models.convert.fields import Fields
from luban.models.convert.llama import Llama, grouped
from luban.nn.mixer.grouped import Grouped


class Mistral(Llama):
    """No biases; a token sees itself and the window − 1 before it (none: all)."""

    model_type: ClassVar[str] = "mistral"
    name: ClassVar[str] = "Mistral"
    span_prefix: ClassVar[str] = "model."
    default_context: ClassVar[int] = 131_072

    def attention(self, fields: Fields) -> Grouped:
        """No biases, no norms."""
        return grouped(fields)

    def windows(self, fields: Fields) -> list[int | None]:
        """Absent means 4,096, null means no window."""
        return [fields.values.get("sliding_window", 4096)] * fields.need("num_hidden_layers")

    def window_fields(self, windows: list[int | None]) -> dict[str, Any] | None:
        """One window for all layers."""
        return {"sliding_window": windows[0]} if len(set(windows)) == 1 else None

    def fits(self, attention: Grouped) -> bool:
        """Without biases and norms."""
        return attention.qk_norm is None and not attention.qkv_bias and not attention.output_bias

    def own(self, attention: Grouped) -> dict[str, Any]:
        """Nothing."""
        return {}
