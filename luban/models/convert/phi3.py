"""Phi-3 and Phi-4 (`model_type = "phi3"`): LLaMA whose projections are stored fused, with a window and partial rotation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from luban.core.errors import UnsupportedError
from luban.models.convert.base import Fused, Pair, Stacked, attention_of
from luban.models.convert.fields import Fields
from luban.models.convert.llama import rotary, rotary_parameters, rotated_width
from luban.models.convert.mistral import Mistral
from luban.models.spec import ModelSpec
from luban.nn.mixer.grouped import Grouped
from luban.nn.position.rope import Rope


class Phi3(Mistral):
    """No biases; a window for all layers or none. Raises UnsupportedError for longrope, which Phi-3's 128k versions use."""

    model_type: ClassVar[str] = "phi3"
    name: ClassVar[str] = "Phi3"
    default_context: ClassVar[int] = 4096
    default_eps: ClassVar[float] = 1e-5

    def windows(self, fields: Fields) -> list[int | None]:
        """One for all layers; absent means none."""
        return [fields.get("sliding_window", None, int)] * fields.need("num_hidden_layers")

    def rotary(self, fields: Fields) -> Rope:
        """Over the leading part of a head."""
        fields.get("original_max_position_embeddings", 0)  # of longrope alone
        made, width = rotary(fields), rotated_width(fields, default=1.0)
        if made.scaling is not None:
            raise UnsupportedError("config.json asks for a rotary scaling; phi3 models with longrope aren't supported")
        return replace(made, width=width)

    def rotary_fields(self, spec: ModelSpec) -> dict[str, Any] | None:
        """Base and part."""
        position, head = spec.position, attention_of(spec.layers[0]).head_width(spec.width)
        if type(position) is not Rope or position.pairing != "half" or position.scaling is not None:
            return None
        share = 1.0 if position.width is None else position.width / head
        parameters = rotary_parameters(position, spec.context)
        return parameters and {"rope_parameters": {**parameters, "partial_rotary_factor": share}}

    def own(self, attention: Grouped) -> dict[str, Any]:
        """No padding token, whose usual id may be outside a small vocabulary."""
        return {"pad_token_id": None}

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """LLaMA's tensors, queries with keys and values and gates with ups in one."""
        attention = attention_of(spec.layers[0])
        for pair in super().pairs(spec):
            if ".k_proj" in pair.theirs or ".v_proj" in pair.theirs or ".up_proj" in pair.theirs:
                continue
            ours = str(pair.ours)
            if ".q_proj" in pair.theirs:
                names = tuple(ours.replace(".q.", f".{part}.") for part in "qkv")
                theirs = pair.theirs.replace("q_proj", "qkv_proj")
                yield Fused(names, theirs, attention.heads, attention.key_heads(), by_head=False)  # type: ignore[arg-type]
            elif ".gate_proj" in pair.theirs:
                yield Stacked((ours, ours.replace(".gate.", ".up.")), pair.theirs.replace("gate_proj", "gate_up_proj"))
            else:
                yield pair
