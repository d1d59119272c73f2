"""T5 and T5 1.1 as Hugging Face writes them (`model_type = "t5"`): pre-norm RMSNorm, relative biases, unscaled scores;
as a language model, with classes or spans, alone, or the encoder alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from luban.core.errors import UnsupportedError
from luban.models.arrangement.pre import PreNorm
from luban.models.convert.base import Pair, attention_of, uniform_layer
from luban.models.convert.decoder_start import decoder_start, encoder_decoder
from luban.models.convert.fields import Fields
from luban.models.encoder import EncoderBody
from luban.models.encoder_decoder import EncoderDecoderBody
from luban.models.head.base import Head
from luban.models.head.hidden import Hidden
from luban.models.head.language_model import LanguageModel
from luban.models.head.rows import Classes
from luban.models.head.tokens import Span, TokenClasses
from luban.models.spec import ModelSpec, uniform
from luban.nn.feedforward.base import FeedForward
from luban.nn.feedforward.gated import SwiGLU, TanhGEGLU
from luban.nn.feedforward.plain import GELU, ReLU, TanhGELU
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import RMSNorm
from luban.nn.position.t5 import RelativeBias

FEEDFORWARD: dict[str, type[FeedForward]] = {
    "relu": ReLU,
    "gelu": GELU,
    "gelu_new": TanhGELU,
    "gated-gelu": TanhGEGLU,
    "gated-silu": SwiGLU,
}
LM = "T5ForConditionalGeneration"
ENCODERS = ("T5EncoderModel", "T5ForTokenClassification")
WRAPPED = (Classes, TokenClasses)  # heads whose classes call the body "transformer"


READOUTS: dict[type[Head], tuple[tuple[str, str], ...]] = {
    Classes: (("head.pool", "classification_head.dense"), ("head.output", "classification_head.out_proj")),
    TokenClasses: (("head.output", "classifier"),),
    Span: (("head.output", "qa_outputs"),),
    Hidden: (),
}


def other_heads(labels: int) -> tuple[Head, ...]:
    """All that isn't a language model; classes are read off the decoder's last token, whose tokens are the source's
    shifted right by one behind the start token."""
    return Classes(count=labels, pooling="last"), TokenClasses(count=labels), Span(), Hidden()


def architecture(head: Head, *, alone: bool) -> str | None:
    """The class of theirs with this head, on the encoder alone or on both sides; None where there is none."""
    both = {Classes: "T5ForSequenceClassification", Span: "T5ForQuestionAnswering", Hidden: "T5Model"}
    return ({Hidden: ENCODERS[0], TokenClasses: ENCODERS[1]} if alone else both).get(type(head))


def attention(ours: str, joint: str, theirs: str) -> tuple[tuple[str, str], ...]:
    """The four weights of one attention; those whose names are in `joint` are owned together."""
    names = [(f"{joint}.{name}" if name in joint else name, name) for name in "qkv"]
    return tuple((f"{ours}.{a}", f"{theirs}.{b}") for a, b in (*names, ("output", "o")))


class T5:
    """No biases anywhere; a head of its own (1.1) or the embedding on hidden states divided by √E."""

    ignored = re.compile(
        r"(transformer\.)?(en|de)coder\.embed_tokens\.weight|lm_head\.weight"
        r"|(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
    )
    body = (EncoderDecoderBody, EncoderBody)
    heads = (LanguageModel, Classes, TokenClasses, Span, Hidden)
    prefix = ""  # files of every class hold the same names, but those whose head wraps the body

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification. Raises UnsupportedError for another feed-forward network."""
        fields = Fields(config, "t5")
        name = self.class_name(fields)
        kind = fields.get("feed_forward_proj", "relu")
        if kind not in FEEDFORWARD:
            raise UnsupportedError(
                f"config.json asks for feed_forward_proj = {kind!r}; known are {', '.join(FEEDFORWARD)}"
            )
        layers = fields.need("num_layers")
        alone = name in ENCODERS
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=fields.need("d_model"),
            layers=layers if alone else fields.get("num_decoder_layers", layers),
            encoder_layers=None if alone else layers,
            context=fields.get("n_positions", 512),
            mixer=Grouped(heads=fields.need("num_heads"), head_dim=fields.need("d_kv"), score_scale=1.0),
            position=RelativeBias(
                buckets=fields.get("relative_attention_num_buckets", 32),
                max_distance=fields.get("relative_attention_max_distance", 128),
            ),
            norm=RMSNorm(eps=fields.get("layer_norm_epsilon", 1e-6)),
            arrangement=PreNorm(),
            feedforward=FEEDFORWARD[kind](width=fields.need("d_ff")),
            **self.head(fields, name),
            body=EncoderBody() if alone else encoder_decoder(fields, start=fields.get("pad_token_id", 0)),
        )

    def class_name(self, fields: Fields) -> str:
        """The class whose weights these are."""
        return fields.architecture(LM)

    def head(self, fields: Fields, name: str) -> dict[str, Any]:
        """Our fields `head` and `tied_head` of the class `name`. Raises UnsupportedError for another."""
        if name == LM:
            scaled = fields.get("scale_decoder_outputs", fields.get("tie_word_embeddings", True))
            tied = scaled or "scale_decoder_outputs" in fields.values  # who writes that field ties in any case
            return {"head": LanguageModel(scale_hidden=scaled), "tied_head": tied}
        known = {architecture(head, alone=name in ENCODERS): head for head in other_heads(fields.labels())}
        if name not in known:
            names = ", ".join(
                (
                    LM,
                    "T5Model",
                    "T5EncoderModel",
                    "T5ForSequenceClassification",
                    "T5ForTokenClassification",
                    "T5ForQuestionAnswering",
                )
            )
            raise UnsupportedError(f"config.json names the architecture {name}; known are {names}")
        return {"head": known[name]}

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec)
        if layer is None:
            return None
        body, heads, position = spec.body, attention_of(layer), spec.position
        kind = next((name for name, made in FEEDFORWARD.items() if type(layer.feedforward) is made), None)
        known = (
            isinstance(layer.norm, RMSNorm)
            and not spec.embedding_norm
            and isinstance(layer.arrangement, PreNorm)
            and kind
            and not layer.feedforward.bias
        )
        plain = heads == Grouped(heads=heads.heads, head_dim=heads.head_dim, score_scale=1.0)
        if not (known and plain and isinstance(position, RelativeBias)):
            return None
        if isinstance(body, EncoderBody) and body != EncoderBody():
            return None
        head = self.head_fields(spec)
        sides = decoder_start(body) if isinstance(body, EncoderDecoderBody) else {}
        return head and {
            **head,
            "model_type": "t5",
            "is_encoder_decoder": isinstance(body, EncoderDecoderBody),
            "vocab_size": spec.vocab_size,
            "d_model": spec.width,
            "d_kv": heads.head_width(spec.width),
            "d_ff": layer.feedforward.width,
            "num_layers": len(spec.encoder or spec.layers),
            "num_decoder_layers": len(spec.layers),
            "num_heads": heads.heads,
            "n_positions": spec.context,
            "relative_attention_num_buckets": position.buckets,
            "relative_attention_max_distance": position.max_distance,
            "layer_norm_epsilon": layer.norm.eps,
            "feed_forward_proj": kind,
            **sides,
        }

    def head_fields(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The fields of config.json about the head, or None where no class of theirs has it."""
        head = spec.head
        if isinstance(head, LanguageModel):
            if isinstance(spec.body, EncoderBody) or head.bias or (head.scale_hidden and not spec.tied_head):
                return None
            scaling = {"scale_decoder_outputs": head.scale_hidden} if spec.tied_head else {}
            return {"architectures": [LM], "tie_word_embeddings": head.scale_hidden, **scaling}
        name = architecture(head, alone=isinstance(spec.body, EncoderBody))
        count = head.count if isinstance(head, WRAPPED) else 0
        labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(count)}} if count else {}
        return {"architectures": [name], **labels} if name and head in other_heads(count or 1) else None

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor."""
        layer = spec.layers[0]
        body = "transformer." if isinstance(spec.head, WRAPPED) else ""
        yield Pair("encoder.embedding.tokens.weight", f"{body}shared.weight")
        yield from self.head_pairs(spec)
        gated = layer.feedforward.gated
        sides = [("encoder", len(spec.encoder or spec.layers))]
        sides += [("decoder", len(spec.layers))] if spec.encoder else []
        for side, layers in sides:
            first = f"{body}{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
            yield Pair(f"{side}.position.weight", first)
            last = 1 if side == "encoder" else 2
            dense = f"layer.{last}.DenseReluDense"
            names = [("mixer_norm", "layer.0.layer_norm"), *attention("mixer", "qkv", "layer.0.SelfAttention")]
            if side == "decoder":
                names += [("cross_norm", "layer.1.layer_norm"), *attention("cross", "kv", "layer.1.EncDecAttention")]
            inner = [("gate", "wi_0"), ("up", "wi_1")] if gated else [("up", "wi")]
            names += [
                ("feedforward_norm", f"layer.{last}.layer_norm"),
                *((f"feedforward.{a}", f"{dense}.{b}") for a, b in (*inner, ("down", "wo"))),
            ]
            for index in range(layers):
                for ours, theirs in names:
                    yield Pair(f"{side}.blocks.{index}.{ours}.weight", f"{body}{side}.block.{index}.{theirs}.weight")
            yield Pair(f"{side}.norm.weight", f"{body}{side}.final_layer_norm.weight")

    def head_pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """The head's tensors."""
        if isinstance(spec.head, LanguageModel):
            names = () if spec.tied_head else (("head.weight", "lm_head.weight"),)
        else:
            names = (
                (f"{ours}.{kind}", f"{theirs}.{kind}")
                for ours, theirs in READOUTS[type(spec.head)]
                for kind in ("weight", "bias")
            )
        yield from (Pair(*pair) for pair in names)
