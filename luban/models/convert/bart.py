"""BART as Hugging Face writes it (`model_type = "bart"`): a post-norm encoder–decoder with learned positions, as
a language model, with classes or spans, or alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.models.arrangement.post import PostNorm
from luban.models.convert.base import Pair, activation_name, attention_of, plain_feedforward, uniform_layer
from luban.models.convert.decoder_start import decoder_start, encoder_decoder
from luban.models.convert.fields import Fields
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.base import Head
from luban.models.head.hidden import Hidden
from luban.models.head.language_model import LanguageModel
from luban.models.head.rows import Classes
from luban.models.head.tokens import Span
from luban.models.spec import ModelSpec, uniform
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned

OFFSET = 2  # unread rows before position 0
SELF = (
    *((f"mixer.qkv.{name}", f"self_attn.{name}_proj") for name in "qkv"),
    ("mixer.output", "self_attn.out_proj"),
    ("mixer_norm", "self_attn_layer_norm"),
)
CROSS = (
    ("cross.q", "encoder_attn.q_proj"),
    ("cross.kv.k", "encoder_attn.k_proj"),
    ("cross.kv.v", "encoder_attn.v_proj"),
    ("cross.output", "encoder_attn.out_proj"),
    ("cross_norm", "encoder_attn_layer_norm"),
)
REST = (("feedforward.up", "fc1"), ("feedforward.down", "fc2"), ("feedforward_norm", "final_layer_norm"))


@dataclass(frozen=True)
class RowPair(Pair):
    """A vector of ours that theirs keeps as a matrix of one row."""

    def split(self, theirs: Tensor) -> dict[str, Tensor]:
        """Our tensor, by name."""
        return {self.ours: theirs[0]}

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """Their tensor."""
        return ours[self.ours][None].contiguous()


LM = "BartForConditionalGeneration"


class Bart:
    """Its bias a token is a buffer there, zero unless someone set it; here it is the head's.

    Classes are read off the last token of the decoder, whose tokens are the source's shifted right by one behind the
    start token, as theirs are.
    """

    ignored = re.compile(r"model\.(en|de)coder\.embed_tokens\.weight|lm_head\.weight")  # copies of the one table
    body = EncoderDecoderBody
    heads = (LanguageModel, Classes, Span, Hidden)
    prefix = "model."

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; refuses sides of different widths."""
        fields = Fields(config, "bart")
        head = self.head(fields)
        fields.only("scale_embedding", False)
        fields.only("tie_word_embeddings", True)
        heads, inner = fields.need("decoder_attention_heads"), fields.need("decoder_ffn_dim")
        fields.only("encoder_attention_heads", heads)
        fields.only("encoder_ffn_dim", inner)
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=fields.need("d_model"),
            layers=fields.need("decoder_layers"),
            context=fields.get("max_position_embeddings", 1024),
            position=Learned(offset=OFFSET),
            mixer=Grouped(heads=heads, qkv_bias=True, output_bias=True),
            norm=LayerNorm(),
            embedding_norm=LayerNorm(),
            feedforward=plain_feedforward(fields.get("activation_function", "gelu"), inner, bias=True),
            arrangement=PostNorm(),
            encoder_layers=fields.need("encoder_layers"),
            body=encoder_decoder(fields, start=2),
            head=head,
            tied_head=isinstance(head, LanguageModel),
        )

    def head(self, fields: Fields) -> Head:
        """The head of the class that wrote the directory. Raises UnsupportedError for another."""
        known: dict[str, Head] = {
            LM: LanguageModel(bias=True),
            "BartModel": Hidden(),
            "BartForSequenceClassification": Classes(count=fields.labels(3), pooling="last"),
            "BartForQuestionAnswering": Span(),
        }
        name = fields.architecture(LM)
        if name not in known:
            raise UnsupportedError(f"config.json names the architecture {name}; known are {', '.join(known)}")
        return known[name]

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        body, attention, norm = spec.body, attention_of(layer), LayerNorm()
        count = spec.head.count if isinstance(spec.head, Classes) else 0
        names = {
            LanguageModel(bias=True): LM,
            Hidden(): "BartModel",
            Span(): "BartForQuestionAnswering",
            Classes(count=count or 1, pooling="last"): "BartForSequenceClassification",
        }
        known = (
            layer.norm == norm
            and spec.embedding_norm == norm
            and spec.position == Learned(offset=OFFSET)
            and spec.head in names
            and isinstance(layer.arrangement, PostNorm)
            and spec.tied_head == isinstance(spec.head, LanguageModel)
            and activation_name(layer.feedforward)
            and layer.feedforward.bias
        )
        plain = attention == Grouped(heads=attention.heads, qkv_bias=True, output_bias=True)
        if not (known and plain and isinstance(body, EncoderDecoderBody)):
            return None
        return {
            "architectures": [names[spec.head]],
            "model_type": "bart",
            "is_encoder_decoder": True,
            "vocab_size": spec.vocab_size,
            "d_model": spec.width,
            "max_position_embeddings": spec.context,
            "encoder_layers": len(spec.encoder),
            "decoder_layers": len(spec.layers),
            "encoder_attention_heads": attention.heads,
            "decoder_attention_heads": attention.heads,
            "encoder_ffn_dim": layer.feedforward.width,
            "decoder_ffn_dim": layer.feedforward.width,
            "activation_function": activation_name(layer.feedforward),
            "scale_embedding": False,
            "tie_word_embeddings": True,
            **decoder_start(body),
            **({"id2label": {str(i): f"LABEL_{i}" for i in range(count)}} if count else {}),
        }

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor."""
        yield Pair("encoder.embedding.tokens.weight", "model.shared.weight")
        if isinstance(spec.head, LanguageModel):
            yield RowPair("head.bias", "final_logits_bias")
        if isinstance(spec.head, Span):
            yield from (Pair(f"head.output.{kind}", f"qa_outputs.{kind}") for kind in ("weight", "bias"))
        if isinstance(spec.head, Classes):
            for kind in ("weight", "bias"):
                yield Pair(f"head.pool.{kind}", f"classification_head.dense.{kind}")
                yield Pair(f"head.output.{kind}", f"classification_head.out_proj.{kind}")
        sides = (("encoder", len(spec.encoder), (*SELF, *REST)), ("decoder", len(spec.layers), (*SELF, *CROSS, *REST)))
        for side, layers, names in sides:
            yield Pair(f"{side}.position.table.weight", f"model.{side}.embed_positions.weight")
            modules = [(f"{side}.embedding.norm", f"model.{side}.layernorm_embedding")]
            modules += [
                (f"{side}.blocks.{index}.{ours}", f"model.{side}.layers.{index}.{theirs}")
                for index in range(layers)
                for ours, theirs in names
            ]
            for ours, theirs in modules:
                yield Pair(f"{ours}.weight", f"{theirs}.weight")
                yield Pair(f"{ours}.bias", f"{theirs}.bias")
