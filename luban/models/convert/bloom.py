"""BLOOM as Hugging Face writes it (`model_type = "bloom"`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.models.arrangement.pre import PreNorm
from luban.models.convert.base import Fused, Pair, attention_of, qkv_names, uniform_layer
from luban.models.convert.decoder_head import HEADS, head_pairs, read_head, write_head
from luban.models.convert.fields import Fields
from luban.models.convert.gpt2 import KINDS, biased
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.plain import TanhGELU
from luban.nn.norm import LayerNorm
from luban.nn.position.alibi import Alibi

CONTEXT = 2048  # trained length; config.json has no field for it, and ALiBi needs none
NAMES = (
    ("mixer_norm", "input_layernorm"),
    ("mixer.output", "self_attention.dense"),
    ("feedforward_norm", "post_attention_layernorm"),
    ("feedforward.up", "mlp.dense_h_to_4h"),
    ("feedforward.down", "mlp.dense_4h_to_h"),
)


class Bloom:
    """Pre-norm LayerNorm, one after the embeddings too, ALiBi, projections fused head by head."""

    ignored = re.compile(r"lm_head\.weight")
    heads = HEADS
    prefix = "transformer."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; refuses the residual after the norm."""
        fields = Fields(config, "bloom")
        fields.only("apply_residual_connection_post_layernorm", False)
        width = fields.get("n_embed", 0) or fields.need("hidden_size")
        heads = fields.get("num_attention_heads", 0) or fields.need("n_head")
        norm = LayerNorm(eps=fields.get("layer_norm_epsilon", 1e-5))
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=width,
            layers=fields.need("n_layer"),
            context=fields.get("seq_length", CONTEXT),
            position=Alibi(),
            arrangement=PreNorm(),
            norm=norm,
            embedding_norm=norm,
            mixer=biased(heads),
            feedforward=TanhGELU(width=4 * width, bias=True),
            **read_head(fields, "Bloom", tied=True),
        )

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        heads = attention_of(layer).heads
        if not (
            type(spec.position) is Alibi
            and isinstance(layer.arrangement, PreNorm)
            and layer.norm == spec.embedding_norm
            and isinstance(layer.norm, LayerNorm)
            and layer.norm.bias
            and layer.mixer == biased(heads)
            and layer.feedforward == TanhGELU(width=4 * spec.width, bias=True)
        ):
            return None
        head = write_head(spec.head, "Bloom")
        return head and {
            **head,
            "model_type": "bloom",
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "n_layer": len(spec.layers),
            "n_head": heads,
            "seq_length": spec.context,
            "layer_norm_epsilon": layer.norm.eps,
            "tie_word_embeddings": spec.tied_head,
        }

    def pairs(self, spec: ModelSpec) -> Iterator[Pair | Fused]:
        """Tensor by tensor."""
        heads = attention_of(spec.layers[0]).heads
        yield Pair("decoder.embedding.tokens.weight", "transformer.word_embeddings.weight")
        for kind in KINDS:
            yield Pair(f"decoder.embedding.norm.{kind}", f"transformer.word_embeddings_layernorm.{kind}")
            for index in range(len(spec.layers)):
                ours, theirs = f"decoder.blocks.{index}", f"transformer.h.{index}"
                names = qkv_names(ours, kind)
                yield Fused(names, f"{theirs}.self_attention.query_key_value.{kind}", heads, heads, by_head=True)
                for mine, foreign in NAMES:
                    yield Pair(f"{ours}.{mine}.{kind}", f"{theirs}.{foreign}.{kind}")
            yield Pair(f"decoder.norm.{kind}", f"transformer.ln_f.{kind}")
        yield from head_pairs(spec, "classifier")
