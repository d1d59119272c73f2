"""BART as Hugging Face writes it (`model_type = "bart"`): a post-norm encoder–decoder with learned positions, as
a language model, with classes or spans, or alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.models.block.post import PostNorm
from luban.models.convert.beginnings import beginnings, encoder_decoder
from luban.models.convert.family import Fields, Pair, activation_name, plain_feedforward
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head import Classes, Head, Hidden, LanguageModel, Span
from luban.models.spec import ModelSpec
from luban.nn.attention.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned

OFFSET = 2  # unread rows before position 0
SELF = (
    *((f"attention.{ours}", f"self_attn.{theirs}_proj") for ours, theirs in zip("qkv", "qkv", strict=True)),
    ("attention.output", "self_attn.out_proj"),
    ("attention_norm", "self_attn_layer_norm"),
)
CROSS = (
    *((f"cross.{ours}", f"encoder_attn.{theirs}_proj") for ours, theirs in zip("qkv", "qkv", strict=True)),
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
        return ModelSpec(
            vocab_size=fields.need("vocab_size"), width=fields.need("d_model"), layers=fields.need("decoder_layers"),
            context=fields.get("max_position_embeddings", 1024), position=Learned(offset=OFFSET),
            attention=Grouped(heads=heads, qkv_bias=True, output_bias=True), norm=LayerNorm(), embedding_norm=LayerNorm(),
            feedforward=plain_feedforward(fields.get("activation_function", "gelu"), inner, bias=True),
            block=PostNorm(), body=encoder_decoder(fields, fields.need("encoder_layers"), start=2),
            head=head, tied_head=isinstance(head, LanguageModel),
        )  # fmt: skip

    def head(self, fields: Fields) -> Head:
        """The head of the class that wrote the directory. Raises UnsupportedError for another."""
        known: dict[str, Head] = {
            LM: LanguageModel(bias=True), "BartModel": Hidden(),
            "BartForSequenceClassification": Classes(count=fields.labels(3), pooling="last"), "BartForQuestionAnswering": Span(),
        }  # fmt: skip
        name = fields.architecture(LM)
        if name not in known:
            raise UnsupportedError(f"config.json names the architecture {name}; known are {', '.join(known)}")
        return known[name]

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        body, attention, norm = spec.body, spec.attention, LayerNorm()
        count = spec.head.count if isinstance(spec.head, Classes) else 0
        names = {LanguageModel(bias=True): LM, Hidden(): "BartModel", Span(): "BartForQuestionAnswering",
                 Classes(count=count or 1, pooling="last"): "BartForSequenceClassification"}  # fmt: skip
        known = (isinstance(body, EncoderDecoderBody) and isinstance(attention, Grouped) and spec.norm == norm
                 and spec.embedding_norm == norm and spec.position == Learned(offset=OFFSET) and spec.head in names
                 and isinstance(spec.block, PostNorm) and spec.tied_head == isinstance(spec.head, LanguageModel)
                 and activation_name(spec.feedforward) and spec.feedforward.bias)  # fmt: skip
        if not known or attention != Grouped(heads=attention.heads, qkv_bias=True, output_bias=True):
            return None
        return {
            "architectures": [names[spec.head]], "model_type": "bart", "is_encoder_decoder": True,
            "vocab_size": spec.vocab_size, "d_model": spec.width, "max_position_embeddings": spec.context,
            "encoder_layers": body.encoder_layers or spec.layers, "decoder_layers": spec.layers,
            "encoder_attention_heads": attention.heads, "decoder_attention_heads": attention.heads,
            "encoder_ffn_dim": spec.feedforward.width, "decoder_ffn_dim": spec.feedforward.width,
            "activation_function": activation_name(spec.feedforward), "scale_embedding": False,
            "tie_word_embeddings": True, **beginnings(body), **({"id2label": {str(i): f"LABEL_{i}" for i in range(count)}} if count else {}),
        }  # fmt: skip

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor."""
        assert isinstance(spec.body, EncoderDecoderBody)
        yield Pair("embedding.weight", "model.shared.weight")
        if isinstance(spec.head, LanguageModel):
            yield RowPair("readout.bias", "final_logits_bias")
        if isinstance(spec.head, Span):
            yield from (Pair(f"readout.output.{kind}", f"qa_outputs.{kind}") for kind in ("weight", "bias"))
        if isinstance(spec.head, Classes):
            for kind in ("weight", "bias"):
                yield Pair(f"readout.pool.{kind}", f"classification_head.dense.{kind}")
                yield Pair(f"readout.output.{kind}", f"classification_head.out_proj.{kind}")
        sides = (("encoder", spec.body.encoder_layers or spec.layers, (*SELF, *REST)),
                 ("decoder", spec.layers, (*SELF, *CROSS, *REST)))  # fmt: skip
        for side, layers, names in sides:
            yield Pair(f"{side}.position.table.weight", f"model.{side}.embed_positions.weight")
            modules = [(f"{side}.embedding_norm", f"model.{side}.layernorm_embedding")]
            modules += [(f"{side}.blocks.{layer}.{ours}", f"model.{side}.layers.{layer}.{theirs}")
                        for layer in range(layers) for ours, theirs in names]  # fmt: skip
            for ours, theirs in modules:
                yield Pair(f"{ours}.weight", f"{theirs}.weight")
                yield Pair(f"{ours}.bias", f"{theirs}.bias")
