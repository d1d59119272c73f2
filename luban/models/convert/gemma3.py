"""Gemma 3, text alone (`model_type = "gemma3_text"`): Gemma with norms around both parts and on queries and keys, and
layers with windows that have rotary positions of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from luban.models.arrangement.sandwich import SandwichNorm
from luban.models.convert.base import attention_of, uniform_layer
from luban.models.convert.fields import Fields
from luban.models.convert.gemma import Gemma
from luban.models.convert.llama import rotary_from, rotary_parameters
from luban.models.convert.qwen2 import FULL, SLIDING
from luban.models.layer import LayerSpec
from luban.models.spec import ModelSpec
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import RMSNorm
from luban.nn.position.rope import Rope

SCALAR = 256  # query_pre_attn_scalar where config.json doesn't say: scores are divided by its root
BASES = {FULL: 1_000_000.0, SLIDING: 10_000.0}


class Gemma3(Gemma):
    """Every sixth layer sees all tokens unless config.json says otherwise; the others see a window, with rotary positions
    of a smaller base and without scaling."""

    model_type: ClassVar[str] = "gemma3_text"
    name: ClassVar[str] = "Gemma3"
    default_context: ClassVar[int] = 131_072
    arrangement = SandwichNorm()
    scaled: ClassVar[bool] = True
    layer_names = (
        ("mixer_norm.weight", "input_layernorm.weight"),
        ("mixer_output_norm.weight", "post_attention_layernorm.weight"),
        ("feedforward_norm.weight", "pre_feedforward_layernorm.weight"),
        ("feedforward_output_norm.weight", "post_feedforward_layernorm.weight"),
        *((f"mixer.qkv.{p}.weight", f"self_attn.{p}_proj.weight") for p in "qkv"),
        ("mixer.output.weight", "self_attn.o_proj.weight"),
        *((f"feedforward.{p}.weight", f"mlp.{p}_proj.weight") for p in ("gate", "up", "down")),
    )

    def attention(self, fields: Fields) -> Grouped:
        """Queries and keys normalised, scores divided by a root of their own."""
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            fields.only(name, None)
        fields.only("use_bidirectional_attention", False)
        return replace(
            super().attention(fields),
            qk_norm=RMSNorm(eps=fields.get("rms_norm_eps", self.default_eps)),
            score_scale=float(fields.get("query_pre_attn_scalar", SCALAR, float)) ** -0.5,
        )

    def rotary(self, fields: Fields) -> Rope:
        """Of the layers that see all tokens."""
        return self.rotary_of(fields, FULL, fields.get("rope_theta", BASES[FULL], float))

    def rotary_of(self, fields: Fields, kind: str, base: float) -> Rope:
        """Of one kind of layer: newer files have a table for each, older ones one for all that see everything."""
        tables = fields.inner("rope_parameters")
        if kind in tables.values:
            return rotary_from(fields, tables.inner(kind), base)
        return rotary_from(fields, fields.inner("rope_scaling"), base) if kind == FULL else Rope(base=base)

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; layers with a window have their own positions."""
        fields, spec = Fields(config, self.model_type), super().spec(config)
        local = self.rotary_of(fields, SLIDING, fields.get("rope_local_base_freq", BASES[SLIDING], float))
        layers = (replace(layer, position=local) if attention_of(layer).window else layer for layer in spec.layers)
        return replace(spec, layers=tuple(layers))

    def windows(self, fields: Fields) -> list[int | None]:
        """Of the layers that `layer_types` names, or of all but every sixth."""
        size, layers = fields.get("sliding_window", 4096), fields.need("num_hidden_layers")
        pattern = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
        usual = [SLIDING if (i + 1) % max(pattern, 1) else FULL for i in range(layers)]
        kinds = fields.get("layer_types", usual)
        return [size if kind == SLIDING else None for kind in kinds]

    def layer(self, spec: ModelSpec) -> LayerSpec | None:
        """The layer that all are like but for windows and the positions that go with them."""
        local = {layer.position for layer in spec.layers if layer.position is not None}
        fits = all((layer.position is not None) == bool(_window(layer)) for layer in spec.layers)
        alike = replace(spec, layers=tuple(replace(layer, position=None) for layer in spec.layers))
        return uniform_layer(alike, windows=True) if fits and len(local) <= 1 else None

    def rotary_fields(self, spec: ModelSpec) -> dict[str, Any] | None:
        """One table for each kind of layer."""
        local = next((layer.position for layer in spec.layers if layer.position is not None), Rope(base=BASES[SLIDING]))
        tables = {}
        for kind, position in ((FULL, spec.position), (SLIDING, local)):
            plain = type(position) is Rope and position.pairing == "half" and position.width is None
            parameters = rotary_parameters(position, spec.context) if plain else None  # type: ignore[arg-type]
            if parameters is None:
                return None
            tables[kind] = parameters
        return {"rope_parameters": tables}

    def window_fields(self, windows: list[int | None]) -> dict[str, Any] | None:
        """Every layer's kind, and one size."""
        sizes = {window for window in windows if window is not None}
        kinds = [FULL if window is None else SLIDING for window in windows]
        return {"layer_types": kinds, "sliding_window": min(sizes, default=4096)} if len(sizes) <= 1 else None

    def fits(self, attention: Grouped) -> bool:
        """RMSNorm on queries and keys, and a scale of the scores that is known."""
        scaled = attention.score_scale is not None or attention.head_dim is not None
        return scaled and isinstance(attention.qk_norm, RMSNorm) and attention.qkv_bias == attention.output_bias

    def own(self, attention: Grouped) -> dict[str, Any]:
        """The scores' scale."""
        scale = attention.score_scale
        scalar = attention.head_dim or 1 if scale is None else scale**-2
        return {
            "attention_bias": attention.qkv_bias,
            "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        }


def _window(layer: LayerSpec) -> int | None:
    return layer.mixer.window if isinstance(layer.mixer, Grouped) else None
