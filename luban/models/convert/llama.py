"""LLaMA 1, 2 and 3 as Hugging Face writes them (`model_type = "llama"`)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from luban.core.errors import UnsupportedError
from luban.models.arrangement.base import Arrangement
from luban.models.arrangement.pre import PreNorm
from luban.models.convert.base import Fused, Pair, Stacked, attention_of, uniform_layer
from luban.models.convert.decoder_head import HEADS, head_pairs, read_head, write_head
from luban.models.convert.fields import Fields
from luban.models.head.tokens import Span
from luban.models.layer import LayerSpec
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.base import FeedForward
from luban.nn.feedforward.gated import Gated, SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import RMSNorm
from luban.nn.position.rope import Rope
from luban.nn.position.scaling import Dynamic, Linear, Llama3, YaRN

LAYER = (
    ("mixer_norm.weight", "input_layernorm.weight"),
    ("mixer.qkv.q.weight", "self_attn.q_proj.weight"),
    ("mixer.qkv.k.weight", "self_attn.k_proj.weight"),
    ("mixer.qkv.v.weight", "self_attn.v_proj.weight"),
    ("mixer.output.weight", "self_attn.o_proj.weight"),
    ("feedforward_norm.weight", "post_attention_layernorm.weight"),
    ("feedforward.gate.weight", "mlp.gate_proj.weight"),
    ("feedforward.up.weight", "mlp.up_proj.weight"),
    ("feedforward.down.weight", "mlp.down_proj.weight"),
)
QKV_BIASES = tuple((f"mixer.qkv.{p}.bias", f"self_attn.{p}_proj.bias") for p in "qkv")
QK_NORMS = tuple((f"mixer.{p}_norm.weight", f"self_attn.{p}_norm.weight") for p in "qk")
OUTPUT_BIAS = (("mixer.output.bias", "self_attn.o_proj.bias"),)
MLP_BIASES = tuple((f"feedforward.{p}.bias", f"mlp.{p}_proj.bias") for p in ("gate", "up", "down"))


class Llama:
    """Pre-norm RMSNorm, rotary positions in halves, SwiGLU, grouped-query attention.

    Relatives that differ in their attention alone override `attention`, `fits`, `own`, `windows` and `window_fields`;
    others also `rotary`, `rotary_fields`, `activation`, `feedforward`, `arrangement`, `head` and `head_fields`.
    """

    ignored = re.compile(r".*rotary_emb\.inv_freq|lm_head\.weight")  # the head is a copy where it is tied
    heads = HEADS
    prefix = "model."
    span_prefix: ClassVar[str] = "transformer."  # what `…ForQuestionAnswering` calls the body
    model_type: ClassVar[str] = "llama"
    name: ClassVar[str] = "Llama"
    default_context: ClassVar[int] = 2048  # where config.json doesn't say
    default_eps: ClassVar[float] = 1e-6
    feedforward: ClassVar[type[Gated]] = SwiGLU
    activation: ClassVar[str] = "silu"  # what theirs call its activation
    arrangement: ClassVar[Arrangement] = PreNorm()
    tied: ClassVar[bool] = False  # where config.json doesn't say
    layer_names: ClassVar[tuple[tuple[str, str], ...]] = LAYER  # tensors of a layer, ours and theirs

    def attention(self, fields: Fields) -> Grouped:
        """Attention as config.json describes it."""
        bias = fields.get("attention_bias", False)
        return grouped(fields, qkv_bias=bias, output_bias=bias)

    scaled: ClassVar[bool] = False  # whether scores may have a scale of their own

    def fits(self, attention: Grouped) -> bool:
        """True if this format supports our attention, apart from the scores' scale."""
        return attention.qk_norm is None and attention.qkv_bias == attention.output_bias

    def own(self, attention: Grouped) -> dict[str, Any]:
        """The fields of config.json about attention that relatives don't share."""
        return {"attention_bias": attention.qkv_bias}

    def windows(self, fields: Fields) -> list[int | None]:
        """The attention window of every layer, None where there is none."""
        return [None] * fields.need("num_hidden_layers")

    def window_fields(self, windows: list[int | None]) -> dict[str, Any] | None:
        """The fields of config.json that say so, or None where this format can't."""
        return None if any(windows) else {}

    def rotary(self, fields: Fields) -> Rope:
        """The model's positions."""
        return rotary(fields)

    def rotary_fields(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The fields of config.json about positions, or None where this format can't say them."""
        position = spec.position
        if type(position) is not Rope or position.pairing != "half" or position.width is not None:
            return None
        parameters = rotary_parameters(position, spec.context)
        return parameters and {"rope_parameters": parameters, "rope_theta": position.base}

    def require_activation(self, fields: Fields) -> None:
        """Raise UnsupportedError for another activation than this format's."""
        fields.only("hidden_act", self.activation)

    def read_feedforward(self, fields: Fields) -> FeedForward:
        """The feed-forward network of every layer."""
        return self.feedforward(width=fields.need("intermediate_size"), bias=fields.get("mlp_bias", False))

    def feedforward_fields(self, feedforward: FeedForward) -> dict[str, Any] | None:
        """The fields of config.json about it, or None where it isn't this format's."""
        if type(feedforward) is not self.feedforward or (feedforward.bias and self.model_type != "llama"):
            return None
        return {"intermediate_size": feedforward.width, "mlp_bias": feedforward.bias}

    def head(self, fields: Fields) -> dict[str, Any]:
        """Our fields `head` and `tied_head`."""
        return read_head(fields, self.name, tied=self.tied)

    def head_fields(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The fields of config.json about the head, or None where no class of theirs has it."""
        return write_head(spec.head, self.name)

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; refuses activations and rotary scalings that aren't built."""
        fields = Fields(config, self.model_type)
        self.require_activation(fields)
        spec = uniform(
            vocab_size=fields.need("vocab_size"),
            width=fields.need("hidden_size"),
            layers=fields.need("num_hidden_layers"),
            context=fields.get("max_position_embeddings", self.default_context),
            mixer=self.attention(fields),
            position=self.rotary(fields),
            norm=RMSNorm(eps=fields.get("rms_norm_eps", self.default_eps)),
            arrangement=self.arrangement,
            feedforward=self.read_feedforward(fields),
            **self.head(fields),
        )
        layers = [with_window(layer, window) for layer, window in zip(spec.layers, self.windows(fields), strict=True)]
        return replace(spec, layers=tuple(layers))

    def layer(self, spec: ModelSpec) -> LayerSpec | None:
        """The layer that all are like but for their windows, or None."""
        return uniform_layer(spec, windows=True)

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = self.layer(spec)
        if layer is None:
            return None
        attention, feedforward = attention_of(layer), self.feedforward_fields(layer.feedforward)
        if not (
            feedforward is not None
            and isinstance(layer.norm, RMSNorm)
            and layer.arrangement == self.arrangement
            and spec.embedding_norm is None
            and self.fits(attention)
            and (self.scaled or attention.score_scale is None)
        ):
            return None
        windows = [attention_of(item).window for item in spec.layers]
        window_fields = self.window_fields(windows)
        if window_fields is None:
            return None
        if attention.qk_norm is not None and attention.qk_norm.eps != layer.norm.eps:
            return None  # these formats have one eps for all
        positions, head = self.rotary_fields(spec), self.head_fields(spec)
        if positions is None or head is None or feedforward is None:
            return None
        return {
            **head,
            "model_type": self.model_type,
            "hidden_act": self.activation,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.key_heads(),
            "head_dim": attention.head_width(spec.width),
            **feedforward,
            "max_position_embeddings": spec.context,
            "rms_norm_eps": layer.norm.eps,
            **positions,
            "tie_word_embeddings": spec.tied_head,
            **self.own(attention),
            **window_fields,
        }

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """Tensor by tensor."""
        layer = spec.layers[0]
        attention = attention_of(layer)
        body = self.span_prefix if isinstance(spec.head, Span) else self.prefix
        yield Pair("decoder.embedding.tokens.weight", f"{body}embed_tokens.weight")
        names = [*self.layer_names]
        names += QK_NORMS if attention.qk_norm else ()
        names += QKV_BIASES if attention.qkv_bias else ()
        names += OUTPUT_BIAS if attention.output_bias else ()
        names += MLP_BIASES if layer.feedforward.bias else ()
        for index in range(len(spec.layers)):
            for ours, theirs in names:
                yield Pair(f"decoder.blocks.{index}.{ours}", f"{body}layers.{index}.{theirs}")
        yield Pair("decoder.norm.weight", f"{body}norm.weight")
        yield from head_pairs(spec)


def with_window(layer: LayerSpec, window: int | None) -> LayerSpec:
    """The layer with this attention window."""
    return replace(layer, mixer=replace(attention_of(layer), window=window))


def grouped(fields: Fields, **changes: Any) -> Grouped:
    """Heads and groups as the whole family writes them."""
    return Grouped(
        heads=fields.need("num_attention_heads"),
        kv_heads=fields.get("num_key_value_heads", None, int),
        head_dim=fields.get("head_dim", None, int),
        **changes,
    )


def rotary(fields: Fields) -> Rope:
    """Rotary positions as config.json describes them, before and since transformers 5; `rope_scaling` counts where there
    is `rope_parameters` too, as in transformers. Raises UnsupportedError for a scaling that isn't built."""
    scaling = fields.inner("rope_scaling", "rope_parameters")
    return rotary_from(fields, scaling, fields.get("rope_theta", 10_000.0))


def rotary_from(fields: Fields, scaling: Fields, base: float) -> Rope:
    """Rotary positions as one table of config.json describes them; `base` where it names none."""
    named = scaling.get("rope_type", scaling.get("type", None, str), str)
    kind, base = named or "default", scaling.get("rope_theta", base, float)
    if named is None and scaling.get("factor", 1.0) != 1:
        raise UnsupportedError(
            f"config.json says {scaling.within}factor = {scaling.values['factor']!r} without a rope_type, so which "
            "scaling it is of is unknown: add rope_type (linear, dynamic, llama3 or yarn)"
        )
    if kind == "default":
        return Rope(base=base)
    trained = scaling.get("original_max_position_embeddings", 0) or fields.get("max_position_embeddings", 0)
    if kind == "linear":
        return Rope(base=base, scaling=Linear(factor=scaling.need("factor", float)))
    if kind == "llama3":
        low, high = (scaling.need(f"{end}_freq_factor", float) for end in ("low", "high"))
        return Rope(
            base=base, scaling=Llama3(factor=scaling.need("factor", float), original=trained, low=low, high=high)
        )
    if kind == "dynamic":  # its context is the trained one: the text may be longer
        factor = scaling.need("factor", float)
        return Rope(base=base, scaling=Dynamic(factor=factor, original=fields.need("max_position_embeddings")))
    if kind == "yarn":
        factor = scaling.get("factor", 0.0) or fields.need("max_position_embeddings") / trained
        return Rope(
            base=base,
            scaling=YaRN(
                factor=factor,
                original=trained,
                fast=scaling.get("beta_fast", 32.0),
                slow=scaling.get("beta_slow", 1.0),
                attention=scaling.get("attention_factor", yarn_amplitude(scaling, factor), float),
                rounded=scaling.get("truncate", True),
            ),
        )
    raise UnsupportedError(
        f"config.json asks for rotary scaling '{kind}'; only default, linear, dynamic, llama3 and yarn are supported"
    )


def rotated_width(fields: Fields, default: float) -> int | None:
    """How many leading dimensions of a head are rotated, by `partial_rotary_factor`; None: all."""
    scaling = fields.inner("rope_scaling", "rope_parameters")
    share = scaling.get("partial_rotary_factor", fields.get("partial_rotary_factor", default, float), float)
    head = fields.get("head_dim", fields.need("hidden_size") // max(fields.need("num_attention_heads"), 1))
    width = int(head * share)
    return None if width == head else width


def yarn_amplitude(scaling: Fields, factor: float) -> float | None:
    """The amplitude from `mscale` and `mscale_all_dim` (DeepSeek); None unless both are set."""
    above, below = scaling.get("mscale", 0.0), scaling.get("mscale_all_dim", 0.0)
    if not (above and below) or factor <= 1:
        return None
    return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)


def rotary_parameters(position: Rope, context: int) -> dict[str, Any] | None:
    """`rope_parameters` of config.json, or None where it has no word for the scaling in a model of this context."""
    scaling, plain = position.scaling, {"rope_theta": position.base}
    if scaling is None:
        return {"rope_type": "default", **plain}
    if isinstance(scaling, Linear):
        return {"rope_type": "linear", "factor": scaling.factor, **plain}
    if isinstance(scaling, Dynamic):
        return {"rope_type": "dynamic", "factor": scaling.factor, **plain} if scaling.original == context else None
    if isinstance(scaling, Llama3):
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.original,
            **plain,
        }
    if isinstance(scaling, YaRN):
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.fast,
            "beta_slow": scaling.slow,
            "attention_factor": scaling.amplitude,
            "truncate": scaling.rounded,
            "original_max_position_embeddings": scaling.original,
            **plain,
        }
    return None
