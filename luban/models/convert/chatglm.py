"""ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B as their authors publish them (`model_type = "chatglm"`).

No class of `transformers` reads this layout; the code published beside the weights does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.models.arrangement.chatglm import NormedResidual
from luban.models.arrangement.pre import PreNorm
from luban.models.convert.base import Fused, Pair, Stacked, attention_of, qkv_names, uniform_layer
from luban.models.convert.fields import Fields
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.feedforward.plain import TanhGELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm, RMSNorm
from luban.nn.position.rope import Rope
from luban.nn.position.two_dimensional import Rope2D

FIRST = (  # modules of a layer with weight and bias: ours, theirs
    ("mixer_norm", "input_layernorm"),
    ("mixer.output", "attention.dense"),
    ("feedforward_norm", "post_attention_layernorm"),
    ("feedforward.up", "mlp.dense_h_to_4h"),
    ("feedforward.down", "mlp.dense_4h_to_h"),
)
SECOND = (  # weights of a layer
    ("mixer_norm", "input_layernorm"),
    ("mixer.output", "self_attention.dense"),
    ("feedforward_norm", "post_attention_layernorm"),
    ("feedforward.down", "mlp.dense_4h_to_h"),
)
KINDS = ("weight", "bias")


class ChatGLM:
    """The first has two-dimensional positions and tied tables; the second and third are LLaMA's parts with partial,
    interleaved rotation and grouped keys."""

    ignored = re.compile(r".*rotary(_pos)?_emb\.inv_freq|lm_head\.weight")
    prefix = "transformer."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; refuses settings of the later ones that their released weights don't use."""
        fields = Fields(config, "chatglm")
        width, heads, layers = (fields.need(name) for name in ("hidden_size", "num_attention_heads", "num_layers"))
        eps = fields.get("layernorm_epsilon", 1e-5)
        if "padded_vocab_size" not in config:
            fields.only("position_encoding_2d", True)
            inner = fields.get("inner_hidden_size", 4 * width)
            return uniform(
                vocab_size=fields.need("vocab_size"),
                width=width,
                layers=layers,
                arrangement=NormedResidual(),
                context=fields.get("max_sequence_length", 2048),
                position=Rope2D(),
                norm=LayerNorm(eps=eps),
                mixer=biased(heads),
                feedforward=TanhGELU(width=inner, bias=True),
                tied_head=True,
            )
        for name, value in (
            ("rmsnorm", True),
            ("add_bias_linear", False),
            ("post_layer_norm", True),
            ("rope_ratio", 1),
            ("apply_residual_connection_post_layernorm", False),
        ):
            fields.only(name, value)
        grouped, head = fields.get("multi_query_attention", False), fields.get("kv_channels", width // heads)
        return uniform(
            vocab_size=fields.need("padded_vocab_size"),
            width=width,
            layers=layers,
            arrangement=PreNorm(),
            context=fields.get("seq_length", 2048),
            position=Rope(width=head // 2, pairing="interleaved"),
            norm=RMSNorm(eps=eps),
            feedforward=SwiGLU(width=fields.need("ffn_hidden_size")),
            mixer=Grouped(
                heads=heads,
                kv_heads=fields.need("multi_query_group_num") if grouped else heads,
                head_dim=None if head * heads == width else head,
                qkv_bias=fields.get("add_qkv_bias", False),
            ),
        )

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't theirs."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        attention = attention_of(layer)
        common = {
            "architectures": ["ChatGLMModel"],
            "model_type": "chatglm",
            "hidden_size": spec.width,
            "num_layers": len(spec.layers),
            "num_attention_heads": attention.heads,
            "layernorm_epsilon": layer.norm.eps,
        }
        if spec.embedding_norm is not None:
            return None
        if self.first(spec):
            known = (
                spec.position == Rope2D()
                and isinstance(layer.norm, LayerNorm)
                and layer.norm.bias
                and spec.tied_head
                and isinstance(layer.feedforward, TanhGELU)
                and layer.feedforward.bias
                and attention == biased(attention.heads)
            )
            return (
                {
                    **common,
                    "vocab_size": spec.vocab_size,
                    "inner_hidden_size": layer.feedforward.width,
                    "max_sequence_length": spec.context,
                    "position_encoding_2d": True,
                }
                if known
                else None
            )
        head = attention.head_width(spec.width)
        known = (
            spec.position == Rope(width=head // 2, pairing="interleaved")
            and isinstance(layer.norm, RMSNorm)
            and isinstance(layer.arrangement, PreNorm)
            and isinstance(layer.feedforward, SwiGLU)
            and not (
                layer.feedforward.bias
                or spec.tied_head
                or attention.output_bias
                or attention.qk_norm
                or attention.window
                or attention.score_scale
            )
        )
        return (
            {
                **common,
                "padded_vocab_size": spec.vocab_size,
                "ffn_hidden_size": layer.feedforward.width,
                "kv_channels": head,
                "seq_length": spec.context,
                "multi_query_attention": True,
                "multi_query_group_num": attention.key_heads(),
                "add_qkv_bias": attention.qkv_bias,
                "add_bias_linear": False,
                "rmsnorm": True,
                "post_layer_norm": True,
                "original_rope": True,
                "apply_residual_connection_post_layernorm": False,
            }
            if known
            else None
        )

    def first(self, spec: ModelSpec) -> bool:
        """True if this has ChatGLM-6B's shape."""
        layer = spec.layers[0]
        return isinstance(layer.arrangement, NormedResidual)

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """Tensor by tensor."""
        yield from self.of_first(spec) if self.first(spec) else self.of_second(spec)

    def of_first(self, spec: ModelSpec) -> Iterator[Pair | Fused]:
        """ChatGLM-6B's: queries, keys and values head by head, biases everywhere."""
        heads = attention_of(spec.layers[0]).heads
        yield Pair("decoder.embedding.tokens.weight", "transformer.word_embeddings.weight")
        for kind in KINDS:
            for index in range(len(spec.layers)):
                ours, theirs = f"decoder.blocks.{index}", f"transformer.layers.{index}"
                names = qkv_names(ours, kind)
                yield Fused(names, f"{theirs}.attention.query_key_value.{kind}", heads, heads, by_head=True)
                yield from (Pair(f"{ours}.{mine}.{kind}", f"{theirs}.{foreign}.{kind}") for mine, foreign in FIRST)
            yield Pair(f"decoder.norm.{kind}", f"transformer.final_layernorm.{kind}")
        if not spec.tied_head:
            yield Pair("head.weight", "lm_head.weight")

    def of_second(self, spec: ModelSpec) -> Iterator[Pair | Fused | Stacked]:
        """ChatGLM2-6B's and ChatGLM3-6B's: all queries, all keys, all values."""
        attention = attention_of(spec.layers[0])
        yield Pair("decoder.embedding.tokens.weight", "transformer.embedding.word_embeddings.weight")
        for index in range(len(spec.layers)):
            ours, theirs = f"decoder.blocks.{index}", f"transformer.encoder.layers.{index}"
            for kind in KINDS if attention.qkv_bias else KINDS[:1]:
                yield Fused(
                    qkv_names(ours, kind),
                    f"{theirs}.self_attention.query_key_value.{kind}",
                    attention.heads,
                    attention.key_heads(),
                    by_head=False,
                )
            yield Stacked(
                (f"{ours}.feedforward.gate.weight", f"{ours}.feedforward.up.weight"),
                f"{theirs}.mlp.dense_h_to_4h.weight",
            )
            yield from (Pair(f"{ours}.{mine}.weight", f"{theirs}.{foreign}.weight") for mine, foreign in SECOND)
        yield Pair("decoder.norm.weight", "transformer.encoder.final_layernorm.weight")
        yield Pair("head.weight", "transformer.output_layer.weight")


def biased(heads: int) -> Grouped:
    """Multi-head attention with biases."""
    return Grouped(heads=heads, kv_heads=heads, qkv_bias=True, output_bias=True)
