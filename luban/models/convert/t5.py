"""T5 and T5 1.1 as Hugging Face writes them (`model_type = "t5"`): pre-norm RMSNorm, relative biases, unscaled scores."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.core.errors import UnsupportedError
from luban.models.block.pre import PreNorm
from luban.models.convert.beginnings import beginnings, encoder_decoder
from luban.models.convert.family import Fields, Pair
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head import LanguageModel
from luban.models.spec import ModelSpec
from luban.nn.attention.grouped import Grouped
from luban.nn.feedforward import GELU, FeedForward, ReLU, TanhGEGLU
from luban.nn.norm import RMSNorm
from luban.nn.position.t5 import RelativeBias

FEEDFORWARD: dict[str, type[FeedForward]] = {"relu": ReLU, "gelu": GELU, "gated-gelu": TanhGEGLU}


LM = "T5ForConditionalGeneration"


def attention(ours: str, theirs: str) -> tuple[tuple[str, str], ...]:
    """The four products of one attention."""
    return tuple((f"{ours}.{a}", f"{theirs}.{b}") for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")))


class T5:
    """No biases anywhere; a head of its own (1.1) or the embedding on hidden states divided by √E."""

    ignored = re.compile(r"(en|de)coder\.embed_tokens\.weight|lm_head\.weight"
                         r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight")  # fmt: skip
    body = EncoderDecoderBody
    heads = (LanguageModel,)
    prefix = "encoder."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification. Raises UnsupportedError for another feed-forward network."""
        fields = Fields(config, "t5")
        name = (fields.get("architectures", None) or [LM])[0]
        if name != LM:
            raise UnsupportedError(f"config.json names the architecture {name}; only {LM} is supported")
        kind = fields.get("feed_forward_proj", "relu")
        if kind not in FEEDFORWARD:
            raise UnsupportedError(
                f"config.json asks for feed_forward_proj = {kind!r}; known are {', '.join(FEEDFORWARD)}"
            )
        scaled = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True))
        tied = scaled or "scale_decoder_outputs" in config  # who writes that field ties in any case
        layers = fields.need("num_layers")
        return ModelSpec(
            vocab_size=fields.need("vocab_size"), width=fields.need("d_model"),
            layers=fields.get("num_decoder_layers", layers), context=fields.get("n_positions", 512),
            attention=Grouped(heads=fields.need("num_heads"), head_dim=fields.need("d_kv"), score_scale=1.0),
            position=RelativeBias(buckets=fields.get("relative_attention_num_buckets", 32),
                                  max_distance=fields.get("relative_attention_max_distance", 128)),
            norm=RMSNorm(eps=fields.get("layer_norm_epsilon", 1e-6)), block=PreNorm(),
            feedforward=FEEDFORWARD[kind](width=fields.need("d_ff")), body=encoder_decoder(fields, layers, start=fields.get("pad_token_id", 0)),
            head=LanguageModel(scale_hidden=scaled), tied_head=tied,
        )  # fmt: skip

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        body, heads, position = spec.body, spec.attention, spec.position
        kind = next((name for name, made in FEEDFORWARD.items() if type(spec.feedforward) is made), None)
        known = (isinstance(body, EncoderDecoderBody) and isinstance(heads, Grouped) and isinstance(position, RelativeBias)
                 and isinstance(spec.norm, RMSNorm) and not spec.embedding_norm and isinstance(spec.block, PreNorm)
                 and kind and not spec.feedforward.bias and isinstance(spec.head, LanguageModel) and not spec.head.bias
                 and (spec.tied_head or not spec.head.scale_hidden))  # fmt: skip
        if not known or heads != Grouped(heads=heads.heads, head_dim=heads.head_dim, score_scale=1.0):
            return None
        return {
            "architectures": [LM], "model_type": "t5", "is_encoder_decoder": True,
            "vocab_size": spec.vocab_size, "d_model": spec.width, "d_kv": heads.head_width(spec.width),
            "d_ff": spec.feedforward.width, "num_layers": body.encoder_layers or spec.layers,
            "num_decoder_layers": spec.layers, "num_heads": heads.heads, "n_positions": spec.context,
            "relative_attention_num_buckets": position.buckets, "relative_attention_max_distance": position.max_distance,
            "layer_norm_epsilon": spec.norm.eps, "feed_forward_proj": kind, "tie_word_embeddings": spec.head.scale_hidden,
            **beginnings(body), **({"scale_decoder_outputs": spec.head.scale_hidden} if spec.tied_head else {}),
        }  # fmt: skip

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor."""
        assert isinstance(spec.body, EncoderDecoderBody)
        yield Pair("embedding.weight", "shared.weight")
        if not spec.tied_head:
            yield Pair("readout.weight", "lm_head.weight")
        gated = spec.feedforward.gated
        for side, layers in (("encoder", spec.body.encoder_layers or spec.layers), ("decoder", spec.layers)):
            first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            yield Pair(f"{side}.position.table.weight", first)
            last = 1 if side == "encoder" else 2
            dense = f"layer.{last}.DenseReluDense"
            names = [("attention_norm", "layer.0.layer_norm"), *attention("attention", "layer.0.SelfAttention")]
            if side == "decoder":
                names += [("cross_norm", "layer.1.layer_norm"), *attention("cross", "layer.1.EncDecAttention")]
            inner = [("gate", "wi_0"), ("up", "wi_1")] if gated else [("up", "wi")]
            names += [("feedforward_norm", f"layer.{last}.layer_norm"),
                      *((f"feedforward.{a}", f"{dense}.{b}") for a, b in (*inner, ("down", "wo")))]  # fmt: skip
            for layer in range(layers):
                for ours, theirs in names:
                    yield Pair(f"{side}.blocks.{layer}.{ours}.weight", f"{side}.block.{layer}.{theirs}.weight")
            yield Pair(f"{side}.norm.weight", f"{side}.final_layer_norm.weight")
