"""Phi-1, Phi-1.5 and Phi-2 (`model_type = "phi"`): attention and feed-forward in parallel, partial rotation, biases."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from luban.models.arrangement.parallel import Parallel
from luban.models.convert.base import (
    Fused,
    Pair,
    Stacked,
    activation_name,
    attention_of,
    plain_feedforward,
    uniform_layer,
)
from luban.models.convert.fields import Fields
from luban.models.convert.llama import rotary, rotary_parameters, rotated_width
from luban.models.head.language_model import LanguageModel
from luban.models.spec import ModelSpec, uniform
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.rope import Rope

KINDS = ("weight", "bias")
LAYER = (
    ("mixer_norm", "input_layernorm"),
    *((f"mixer.qkv.{part}", f"self_attn.{part}_proj") for part in "qkv"),
    ("mixer.output", "self_attn.dense"),
    ("feedforward.up", "mlp.fc1"),
    ("feedforward.down", "mlp.fc2"),
)
SHARE = 0.5  # of a head that is rotated, where config.json doesn't say


class Phi:
    """One LayerNorm a layer for both parts; biases everywhere, in the head too."""

    ignored = re.compile(r".*rotary_emb\.inv_freq")
    heads = (LanguageModel,)
    prefix = "model."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; refuses norms on queries and keys."""
        fields = Fields(config, "phi")
        fields.only("qk_layernorm", False)
        fields.only("tie_word_embeddings", False)
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=fields.need("hidden_size"),
            layers=fields.need("num_hidden_layers"),
            context=fields.get("max_position_embeddings", 2048),
            arrangement=Parallel(norms=1),
            position=replace(rotary(fields), width=rotated_width(fields, default=SHARE)),
            norm=LayerNorm(eps=fields.get("layer_norm_eps", 1e-5)),
            mixer=Grouped(
                heads=fields.need("num_attention_heads"),
                kv_heads=fields.get("num_key_value_heads", None, int),
                qkv_bias=True,
                output_bias=True,
            ),
            feedforward=plain_feedforward(
                fields.get("hidden_act", "gelu_new"), fields.need("intermediate_size"), bias=True
            ),
            head=LanguageModel(bias=True),
        )

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        attention, position, activation = attention_of(layer), spec.position, activation_name(layer.feedforward)
        plain = Grouped(heads=attention.heads, kv_heads=attention.kv_heads, qkv_bias=True, output_bias=True)
        known = (
            layer.arrangement == Parallel(norms=1)
            and isinstance(layer.norm, LayerNorm)
            and layer.norm.bias
            and attention == plain
            and activation
            and layer.feedforward.bias
            and spec.embedding_norm is None
            and spec.head == LanguageModel(bias=True)
            and not spec.tied_head
        )
        if not known or type(position) is not Rope or position.pairing != "half":
            return None
        parameters = rotary_parameters(position, spec.context)
        head = attention.head_width(spec.width)
        return parameters and {
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.key_heads(),
            "intermediate_size": layer.feedforward.width,
            "hidden_act": activation,
            "max_position_embeddings": spec.context,
            "layer_norm_eps": layer.norm.eps,
            "rope_parameters": {**parameters, "partial_rotary_factor": (position.width or head) / head},
            "tie_word_embeddings": False,
        }

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """Tensor by tensor."""
        yield Pair("decoder.embedding.tokens.weight", "model.embed_tokens.weight")
        for kind in KINDS:
            for index in range(len(spec.layers)):
                ours, theirs = f"decoder.blocks.{index}", f"model.layers.{index}"
                yield from (Pair(f"{ours}.{mine}.{kind}", f"{theirs}.{foreign}.{kind}") for mine, foreign in LAYER)
            yield Pair(f"decoder.norm.{kind}", f"model.final_layernorm.{kind}")
            yield Pair(f"head.{kind}", f"lm_head.{kind}")
