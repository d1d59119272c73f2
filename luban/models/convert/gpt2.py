"""GPT-2 as Hugging Face writes it (`model_type = "gpt2"`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.models.block.pre import PreNorm
from luban.models.convert.decoder_head import HEADS, head_pairs, read_head, write_head
from luban.models.convert.family import Fields, Fused, Pair, activation_name, plain_feedforward
from luban.models.spec import ModelSpec
from luban.nn.attention.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned

LAYER = (  # ours, theirs, whether transposed
    ("attention_norm", "ln_1", False),
    ("attention.output", "attn.c_proj", True),
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
        return ModelSpec(
            vocab_size=fields.need("vocab_size"), width=width, layers=fields.need("n_layer"),
            context=fields.get("n_positions", 1024), position=Learned(), block=PreNorm(),
            norm=LayerNorm(eps=fields.get("layer_norm_epsilon", 1e-5)), attention=biased(fields.need("n_head")),
            feedforward=plain_feedforward(fields.get("activation_function", "gelu_new"),
                                          fields.get("n_inner", 4 * width), bias=True),
            **read_head(fields, "GPT2", tied=True),
        )  # fmt: skip

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        activation = activation_name(spec.feedforward)
        if not (type(spec.position) is Learned and isinstance(spec.block, PreNorm) and plain_layernorm(spec)
                and activation and spec.attention == biased(spec.attention.heads)):  # fmt: skip
            return None
        head = write_head(spec.head, "GPT2", "GPT2LMHeadModel")
        return head and {
            **head, "model_type": "gpt2", "vocab_size": spec.vocab_size,
            "n_positions": spec.context, "n_embd": spec.width, "n_layer": spec.layers, "n_head": spec.attention.heads,
            "n_inner": spec.feedforward.width, "activation_function": activation,
            "layer_norm_epsilon": spec.norm.eps, "tie_word_embeddings": spec.tied_head,
        }  # fmt: skip

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused]:
        """Tensor by tensor."""
        yield Pair("embedding.weight", "transformer.wte.weight")
        yield Pair("position.table.weight", "transformer.wpe.weight")
        yield from conv_layers(spec)
        yield from (Pair(f"norm.{kind}", f"transformer.ln_f.{kind}") for kind in KINDS)
        yield from head_pairs(spec, "classifier")


def biased(heads: int) -> Grouped:
    """Multi-head attention with biases."""
    return Grouped(heads=heads, kv_heads=heads, qkv_bias=True, output_bias=True)


def plain_layernorm(spec: ModelSpec) -> bool:
    """Whether every norm is a LayerNorm with a shift, dense layers have biases, and nothing is normalised besides."""
    shifted = isinstance(spec.norm, LayerNorm) and spec.norm.bias
    return shifted and spec.feedforward.bias and spec.embedding_norm is None


def conv_layers(spec: ModelSpec) -> Iterator[Pair | Fused]:
    """The layers of GPT and GPT-2, whose dense layers are stored transposed and whose projections are fused."""
    heads = spec.attention.heads
    for layer in range(spec.layers):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        for kind in KINDS:
            yield Fused(tuple(f"{ours}.attention.{p}.{kind}" for p in "qkv"), f"{theirs}.attn.c_attn.{kind}",
                        heads, heads, by_head=False, transposed=True)  # fmt: skip
            for mine, foreign, transposed in LAYER:
                yield Pair(f"{ours}.{mine}.{kind}", f"{theirs}.{foreign}.{kind}", transposed)
