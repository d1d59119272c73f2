"""Gemma 1 (`model_type = "gemma"`): LLaMA with a GELU gate, embeddings times √E, and norms whose weights are stored less 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from luban.models.convert.base import Centred, Fused, Pair, Scaled, Stacked
from luban.models.convert.decoder_head import write_head
from luban.models.convert.fields import Fields
from luban.models.convert.llama import Llama, grouped
from luban.models.head.language_model import LanguageModel
from luban.models.spec import ModelSpec
from luban.nn.feedforward.gated import TanhGEGLU
from luban.nn.mixer.grouped import Grouped

HEAD_DIM = 256  # where config.json doesn't say


class Gemma(Llama):
    """The embeddings here hold the factor √E already; a tied head divides by it, as `LanguageModel(scale_hidden=True)` does."""

    model_type: ClassVar[str] = "gemma"
    name: ClassVar[str] = "Gemma"
    heads = (LanguageModel,)
    default_context: ClassVar[int] = 8192
    feedforward = TanhGEGLU
    activation: ClassVar[str] = "gelu_pytorch_tanh"
    tied: ClassVar[bool] = True

    def require_activation(self, fields: Fields) -> None:
        """GELU's tanh approximation, which the first releases call gelu."""
        if fields.get("hidden_act", "gelu") != "gelu":
            fields.only("hidden_act", self.activation)
        fields.only("hidden_activation", self.activation)

    def attention(self, fields: Fields) -> Grouped:
        """A head dim of its own."""
        bias = fields.get("attention_bias", False)
        attention = grouped(fields, qkv_bias=bias, output_bias=bias)
        return replace(attention, head_dim=fields.get("head_dim", HEAD_DIM))

    def head(self, fields: Fields) -> dict[str, Any]:
        """A language model whose hidden states are divided by √E."""
        return {**super().head(fields), "head": LanguageModel(scale_hidden=True)}

    def head_fields(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The same as a class of theirs."""
        scaled = spec.head == LanguageModel(scale_hidden=True)
        return write_head(LanguageModel(), self.name) if scaled else None

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """LLaMA's tensors, embedding and head scaled and norms moved by 1."""
        for pair in super().pairs(replace(spec, head=LanguageModel())):
            if not isinstance(pair, Pair):
                yield pair
            elif pair.theirs.endswith("norm.weight"):
                yield Centred(pair.ours, pair.theirs)
            elif pair.theirs.endswith(("embed_tokens.weight", "lm_head.weight")):
                yield Scaled(pair.ours, pair.theirs, factor=spec.width**0.5)
            else:
                yield pair
