"""Falcon as Hugging Face writes it (`model_type = "falcon"`): the 7B form, the 40B form, and RW's,
which is serial with ALiBi."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.core.errors import UnsupportedError
from luban.models.arrangement.parallel import Parallel
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
from luban.models.convert.llama import rotary, rotary_parameters
from luban.models.spec import ModelSpec, uniform
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.base import Position
from luban.nn.position.falcon_alibi import FalconAlibi
from luban.nn.position.rope import Rope

DENSE = (
    ("mixer.output", "self_attention.dense"),
    ("feedforward.up", "mlp.dense_h_to_4h"),
    ("feedforward.down", "mlp.dense_4h_to_h"),
)


class Falcon:
    """LayerNorm, rotary positions in halves or Falcon's ALiBi, exact GELU; attention and feed-forward in parallel or serial."""

    ignored = re.compile(r".*rotary_emb\.inv_freq|lm_head\.weight")
    heads = HEADS
    prefix = "transformer."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification. Raises UnsupportedError for the 40B form made serial."""
        fields = Fields(config, "falcon")
        width, heads = fields.need("hidden_size"), fields.need("num_attention_heads")
        grouped = fields.get("new_decoder_architecture", False)
        several = fields.get("num_kv_heads", heads)  # of the 40B form alone
        kv_heads = several if grouped else 1 if fields.get("multi_query", True) else heads
        block = PreNorm()
        if fields.get("parallel_attn", True):
            block = Parallel(norms=fields.get("num_ln_in_parallel_attn", 2) if grouped else 1)
        elif grouped:
            raise UnsupportedError(
                "config.json asks for new_decoder_architecture with parallel_attn = False; the 40B form is parallel"
            )
        bias = fields.get("bias", False)
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=width,
            layers=fields.need("num_hidden_layers"),
            context=fields.get("max_position_embeddings", 2048),
            arrangement=block,
            position=FalconAlibi() if fields.get("alibi", False) else rotary(fields),
            norm=LayerNorm(eps=fields.get("layer_norm_epsilon", 1e-5)),
            mixer=Grouped(heads=heads, kv_heads=kv_heads, qkv_bias=bias, output_bias=bias),
            feedforward=plain_feedforward(
                fields.get("activation", "gelu"), fields.get("ffn_hidden_size", 4 * width), bias=bias
            ),
            **read_head(fields, "Falcon", tied=True),
        )

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        attention, block, activation = attention_of(layer), layer.arrangement, activation_name(layer.feedforward)
        bias, keys = layer.feedforward.bias, attention.key_heads()
        layernorm = isinstance(layer.norm, LayerNorm) and layer.norm.bias and spec.embedding_norm is None
        plain = attention == Grouped(heads=attention.heads, kv_heads=keys, qkv_bias=bias, output_bias=bias)
        positions = _positions(spec.position, spec.context)
        if not (layernorm and plain and activation and isinstance(block, (Parallel, PreNorm)) and positions):
            return None
        parallel = isinstance(block, Parallel)
        norms = block.norms if parallel else None
        grouped = parallel and (norms == 2 or keys not in (1, attention.heads))
        if not grouped and keys not in (1, attention.heads):
            return None
        head = write_head(spec.head, "Falcon")
        return head and {
            **head,
            "model_type": "falcon",
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": attention.heads,
            "num_kv_heads": keys,
            "new_decoder_architecture": grouped,
            "multi_query": keys == 1 and not grouped,
            "parallel_attn": parallel,
            "num_ln_in_parallel_attn": norms if grouped else None,
            "bias": bias,
            "activation": activation,
            "ffn_hidden_size": layer.feedforward.width,
            "max_position_embeddings": spec.context,
            "layer_norm_epsilon": layer.norm.eps,
            "tie_word_embeddings": spec.tied_head,
            **positions,
        }

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused]:
        """Tensor by tensor."""
        layer = spec.layers[0]
        attention, dense = attention_of(layer), ("weight", "bias") if layer.feedforward.bias else ("weight",)
        norms = _norms(spec)
        yield Pair("decoder.embedding.tokens.weight", "transformer.word_embeddings.weight")
        for index in range(len(spec.layers)):
            ours, theirs = f"decoder.blocks.{index}", f"transformer.h.{index}"
            for kind in dense:
                yield Fused(
                    qkv_names(ours, kind),
                    f"{theirs}.self_attention.query_key_value.{kind}",
                    attention.heads,
                    attention.key_heads(),
                    by_head=True,
                )
                yield from (Pair(f"{ours}.{mine}.{kind}", f"{theirs}.{foreign}.{kind}") for mine, foreign in DENSE)
            for mine, foreign in norms:
                yield from (Pair(f"{ours}.{mine}.{k}", f"{theirs}.{foreign}.{k}") for k in ("weight", "bias"))
        yield from (Pair(f"decoder.norm.{kind}", f"transformer.ln_f.{kind}") for kind in ("weight", "bias"))
        yield from head_pairs(spec, "classifier")


def _positions(position: Position, context: int) -> dict[str, Any] | None:
    """The fields about positions, or None where this format has no word for them."""
    if position == FalconAlibi():
        return {"alibi": True}
    if type(position) is not Rope or position != Rope(base=position.base, scaling=position.scaling):
        return None
    rope = rotary_parameters(position, context)
    return rope and {"alibi": False, "rope_parameters": rope, "rope_theta": position.base}


def _norms(spec: ModelSpec) -> tuple[tuple[str, str], ...]:
    layer = spec.layers[0]
    if isinstance(layer.arrangement, PreNorm):
        return (("mixer_norm", "input_layernorm"), ("feedforward_norm", "post_attention_layernorm"))
    if isinstance(layer.arrangement, Parallel) and layer.arrangement.norms == 2:
        return (("mixer_norm", "ln_attn"), ("feedforward_norm", "ln_mlp"))
    return (("mixer_norm", "input_layernorm"),)
