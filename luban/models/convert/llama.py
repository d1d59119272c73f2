"""LLaMA 1, 2 and 3 as Hugging Face writes them (`model_type = "llama"`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.core.errors import UnsupportedError
from luban.models.block.pre import PreNorm
from luban.models.convert.family import Fields, Pair
from luban.models.spec import ModelSpec
from luban.nn.attention.grouped import Grouped
from luban.nn.feedforward import SwiGLU
from luban.nn.norm import RMSNorm
from luban.nn.position.rope import Rope

LAYER = (
    ("attention_norm.weight", "input_layernorm.weight"),
    ("attention.q.weight", "self_attn.q_proj.weight"),
    ("attention.k.weight", "self_attn.k_proj.weight"),
    ("attention.v.weight", "self_attn.v_proj.weight"),
    ("attention.output.weight", "self_attn.o_proj.weight"),
    ("feedforward_norm.weight", "post_attention_layernorm.weight"),
    ("feedforward.gate.weight", "mlp.gate_proj.weight"),
    ("feedforward.up.weight", "mlp.up_proj.weight"),
    ("feedforward.down.weight", "mlp.down_proj.weight"),
)
QKV_BIASES = tuple((f"attention.{p}.bias", f"self_attn.{p}_proj.bias") for p in "qkv")
OUTPUT_BIAS = (("attention.output.bias", "self_attn.o_proj.bias"),)
MLP_BIASES = tuple((f"feedforward.{p}.bias", f"mlp.{p}_proj.bias") for p in ("gate", "up", "down"))


class Llama:
    """Pre-norm RMSNorm, rotary positions in halves, SwiGLU, grouped-query attention."""

    ignored = re.compile(r".*rotary_emb\.inv_freq|lm_head\.weight")  # the head is a copy where it is tied

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; refuses activations and rotary scalings that aren't built."""
        fields = Fields(config, "llama")
        fields.only("hidden_act", "silu")
        bias = fields.get("attention_bias", False)
        attention = Grouped(heads=fields.need("num_attention_heads"), kv_heads=fields.get("num_key_value_heads", None),
                            head_dim=fields.get("head_dim", None), qkv_bias=bias, output_bias=bias)  # fmt: skip
        return ModelSpec(
            vocab_size=fields.need("vocab_size"), width=fields.need("hidden_size"),
            layers=fields.need("num_hidden_layers"), context=fields.get("max_position_embeddings", 2048),
            attention=attention, position=rotary(fields), norm=RMSNorm(eps=fields.get("rms_norm_eps", 1e-6)),
            feedforward=SwiGLU(width=fields.need("intermediate_size"), bias=fields.get("mlp_bias", False)),
            tied_head=fields.get("tie_word_embeddings", False),
        )  # fmt: skip

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't LLaMA's."""
        attention, feedforward, position = spec.attention, spec.feedforward, spec.position
        kinds = (type(attention), type(feedforward), type(position), type(spec.norm), type(spec.block))
        if kinds != (Grouped, SwiGLU, Rope, RMSNorm, PreNorm):
            return None
        if (attention.qk_norm is not None or attention.window is not None or position.pairing != "half"
                or position.width is not None or attention.qkv_bias != attention.output_bias):  # fmt: skip
            return None
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "vocab_size": spec.vocab_size, "hidden_size": spec.width, "num_hidden_layers": spec.layers,
            "num_attention_heads": attention.heads, "num_key_value_heads": attention.key_heads(),
            "head_dim": attention.head_width(spec.width), "intermediate_size": feedforward.width,
            "max_position_embeddings": spec.context, "rms_norm_eps": spec.norm.eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": position.base}, "rope_theta": position.base,
            "attention_bias": attention.qkv_bias, "mlp_bias": feedforward.bias,
            "tie_word_embeddings": spec.tied_head,
        }  # fmt: skip

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor."""
        yield Pair("embedding.weight", "model.embed_tokens.weight")
        names = [*LAYER]
        names += QKV_BIASES if spec.attention.qkv_bias else ()
        names += OUTPUT_BIAS if spec.attention.output_bias else ()
        names += MLP_BIASES if spec.feedforward.bias else ()
        for layer in range(spec.layers):
            for ours, theirs in names:
                yield Pair(f"blocks.{layer}.{ours}", f"model.layers.{layer}.{theirs}")
        yield Pair("norm.weight", "model.norm.weight")
        if not spec.tied_head:
            yield Pair("readout.weight", "lm_head.weight")


def rotary(fields: Fields) -> Rope:
    """Rotary positions as config.json describes them, before and since transformers 5."""
    scaling = fields.get("rope_parameters", None) or fields.get("rope_scaling", None) or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise UnsupportedError(f"config.json asks for rotary scaling '{kind}'; only 'default' is supported")
    return Rope(base=scaling.get("rope_theta", fields.get("rope_theta", 10_000.0)))
