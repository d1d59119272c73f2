"""GPT-2 as Hugging Face writes it (`model_type = "gpt2"`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.models.arrangement.pre import PreNorm
from luban.models.convert.base import (
    Fused,
    Pair,
    activation_name,
    attention_of,
    plain_feedforward,
    qkv_names,
    uniform_layer,
)
from luban.models.convert.decoder_head import HEADS, head_pairs, read_head, write_head
from luban.models.convert.fields import Fields
from luban.models.spec import ModelSpec, uniform
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned

LAYER = (  # ours, theirs, whether transposed
    ("mixer_norm", "ln_1", False),
    ("mixer.output", "attn.c_proj", True),
    ("feedforward_norm", "ln_2", False),
    ("feedforward.up", "mlp.c_fc", True),
    ("feedforward.down", "mlp.c_proj", True),
)
KINDS = ("weight", "bias")


class GPT2:
    """Pre-norm LayerNorm, learned positions, biases everywhere, dense layers stored transposed."""

    ignored = re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)|lm_head\.weight")
    heads = HEADS
    prefix = "transformer."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; refuses scalings of the scores that aren't built."""
        fields = Fields(config, "gpt2")
        fields.only("scale_attn_weights", True)
        fields.only("scale_attn_by_inverse_layer_idx", False)
        fields.only("add_cross_attention", False)
        width = fields.need("n_embd")
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=width,
            layers=fields.need("n_layer"),
            context=fields.get("n_positions", 1024),
            position=Learned(),
            arrangement=PreNorm(),
            norm=LayerNorm(eps=fields.get("layer_norm_epsilon", 1e-5)),
            mixer=biased(fields.need("n_head")),
            feedforward=plain_feedforward(
                fields.get("activation_function", "gelu_new"), fields.get("n_inner", 4 * width), bias=True
            ),
            **read_head(fields, "GPT2", tied=True),
        )

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        activation, heads = activation_name(layer.feedforward), attention_of(layer).heads
        if not (
            spec.position == Learned()
            and isinstance(layer.arrangement, PreNorm)
            and plain_layernorm(spec)
            and activation
            and layer.mixer == biased(heads)
        ):
            return None
        head = write_head(spec.head, "GPT2", "GPT2LMHeadModel")
        return head and {
            **head,
            "model_type": "gpt2",
            "vocab_size": spec.vocab_size,
            "n_positions": spec.context,
            "n_embd": spec.width,
            "n_layer": len(spec.layers),
            "n_head": heads,
            "n_inner": layer.feedforward.width,
            "activation_function": activation,
            "layer_norm_epsilon": layer.norm.eps,
            "tie_word_embeddings": spec.tied_head,
        }

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused]:
        """Tensor by tensor."""
        yield Pair("decoder.embedding.tokens.weight", "transformer.wte.weight")
        yield Pair("decoder.position.table.weight", "transformer.wpe.weight")
        yield from conv_layers(spec)
        yield from (Pair(f"decoder.norm.{kind}", f"transformer.ln_f.{kind}") for kind in KINDS)
        yield from head_pairs(spec, "classifier")


def biased(heads: int) -> Grouped:
    """Multi-head attention with biases."""
    return Grouped(heads=heads, kv_heads=heads, qkv_bias=True, output_bias=True)


def plain_layernorm(spec: ModelSpec) -> bool:
    """True if all norms are LayerNorms with bias, linear layers have biases, and there are no further norms."""
    layer = spec.layers[0]
    shifted = isinstance(layer.norm, LayerNorm) and layer.norm.bias
    return shifted and layer.feedforward.bias and spec.embedding_norm is None


def conv_layers(spec: ModelSpec) -> Iterator[Pair | Fused]:
    """The layers of GPT and GPT-2, whose dense layers are stored transposed and whose projections are fused."""
    heads = attention_of(spec.layers[0]).heads
    for index in range(len(spec.layers)):
        ours, theirs = f"decoder.blocks.{index}", f"transformer.h.{index}"
        for kind in KINDS:
            yield Fused(
                qkv_names(ours, kind), f"{theirs}.attn.c_attn.{kind}", heads, heads, by_head=False, transposed=True
            )
            for mine, foreign, transposed in LAYER:
                yield Pair(f"{ours}.{mine}.{kind}", f"{theirs}.{foreign}.{kind}", transposed)
