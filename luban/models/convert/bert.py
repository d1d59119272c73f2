"""BERT as Hugging Face writes it (`model_type = "bert"`): masked LM, classes of rows, tokens and spans, no head."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from luban.core.errors import UnsupportedError
from luban.models.arrangement.post import PostNorm
from luban.models.convert.base import Pair, activation_name, attention_of, plain_feedforward, uniform_layer
from luban.models.convert.fields import Fields
from luban.models.encoder import EncoderBody
from luban.models.head.base import Head
from luban.models.head.hidden import Hidden
from luban.models.head.masked_lm import MaskedLM
from luban.models.head.rows import Classes
from luban.models.head.tokens import Span, TokenClasses
from luban.models.spec import ModelSpec, uniform
from luban.nn.mixer.grouped import Grouped
from luban.nn.norm import LayerNorm
from luban.nn.position.learned import Learned

LAYER = (
    ("mixer.qkv.q", "attention.self.query"),
    ("mixer.qkv.k", "attention.self.key"),
    ("mixer.qkv.v", "attention.self.value"),
    ("mixer.output", "attention.output.dense"),
    ("mixer_norm", "attention.output.LayerNorm"),
    ("feedforward.up", "intermediate.dense"),
    ("feedforward.down", "output.dense"),
    ("feedforward_norm", "output.LayerNorm"),
)
EMBEDDINGS = (
    ("encoder.embedding.tokens", "embeddings.word_embeddings"),
    ("encoder.position.table", "embeddings.position_embeddings"),
    ("encoder.embedding.segments", "embeddings.token_type_embeddings"),
)
POOLER = ("head.pool", "bert.pooler.dense")


class Bert:
    """Post-norm encoder with learned positions and segments. Its relatives override names, `body` and `positions`."""

    ignored = re.compile(
        r".*position_ids|cls\.predictions\.decoder\..*"  # the head's table is a copy where tied
        r"|bert\.pooler\..*|cls\.seq_relationship\..*"
    )  # published beside a masked-LM head
    body: ClassVar[type[EncoderBody]] = EncoderBody
    shared: ClassVar[bool] = False  # whether layers may share parameters
    heads: ClassVar[tuple[type[Head], ...]] = (MaskedLM, Classes, TokenClasses, Span, Hidden)
    model_type: ClassVar[str] = "bert"
    name: ClassVar[str] = "Bert"
    prefix: ClassVar[str] = "bert."
    masked_lm: ClassVar[tuple[tuple[str, str], ...]] = (  # modules of the masked-LM head
        ("head.transform", "cls.predictions.transform.dense"),
        ("head.norm", "cls.predictions.transform.LayerNorm"),
    )
    vocabulary_bias: ClassVar[str] = "cls.predictions.bias"
    vocabulary: ClassVar[str] = "cls.predictions.decoder"  # its table where it isn't tied
    pair: ClassVar[tuple[tuple[str, str], ...]] = (POOLER, ("head.pair", "cls.seq_relationship"))
    classes: ClassVar[tuple[tuple[str, str], ...]] = (POOLER, ("head.output", "classifier"))
    pooler: ClassVar[tuple[str, str]] = POOLER
    default_segments: ClassVar[int] = 2
    default_activation: ClassVar[str] = "gelu"

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The specification; the head is the one that `architectures` names."""
        fields = Fields(config, self.model_type)
        fields.only("position_embedding_type", "absolute")
        fields.only("is_decoder", False)
        norm = LayerNorm(eps=fields.get("layer_norm_eps", 1e-12))
        return uniform(
            vocab_size=fields.need("vocab_size"),
            width=fields.need("hidden_size"),
            layers=fields.need("num_hidden_layers"),
            context=self.context(fields),
            position=self.positions(fields),
            mixer=Grouped(heads=fields.need("num_attention_heads"), qkv_bias=True, output_bias=True),
            norm=norm,
            embedding_norm=norm,
            feedforward=plain_feedforward(
                fields.get("hidden_act", self.default_activation), fields.need("intermediate_size"), bias=True
            ),
            arrangement=PostNorm(),
            body=self.encoder(fields),
            head=self.head(fields),
            tied_head=isinstance(self.head(fields), MaskedLM) and fields.get("tie_word_embeddings", True),
        )

    def context(self, fields: Fields) -> int:
        """Longest sequence."""
        return fields.get("max_position_embeddings", 512)

    def positions(self, fields: Fields) -> Learned:
        """A table that begins with position 0."""
        return Learned()

    def encoder(self, fields: Fields) -> EncoderBody:
        """Its embeddings."""
        return EncoderBody(segments=fields.get("type_vocab_size", self.default_segments))

    def head(self, fields: Fields) -> Head:
        """The head of the class that wrote the directory. Raises UnsupportedError for another."""
        labels = fields.labels()
        known: dict[str, Head] = {
            f"{self.name}ForMaskedLM": MaskedLM(),
            f"{self.name}ForPreTraining": MaskedLM(pair=True),
            f"{self.name}ForSequenceClassification": Classes(count=labels),
            f"{self.name}ForTokenClassification": TokenClasses(count=labels),
            f"{self.name}ForQuestionAnswering": Span(),
            f"{self.name}Model": Hidden(pool=True),
        }
        name = fields.architecture(f"{self.name}ForMaskedLM")
        if name not in known:
            raise UnsupportedError(f"config.json names the architecture {name}; known are {', '.join(known)}")
        return known[name]

    def architecture(self, head: Head) -> str:
        """The class of theirs with this head."""
        if isinstance(head, Hidden):
            return f"{self.name}Model"
        if isinstance(head, MaskedLM):
            return f"{self.name}{'ForPreTraining' if head.pair else 'ForMaskedLM'}"
        kinds = {Classes: "SequenceClassification", TokenClasses: "TokenClassification", Span: "QuestionAnswering"}
        return f"{self.name}For{kinds[type(head)]}"

    def fits(self, spec: ModelSpec) -> bool:
        """True if this format supports our embeddings, positions and head."""
        assert isinstance(spec.body, EncoderBody)
        if isinstance(spec.head, MaskedLM) and spec.head.activation is not None:
            return False
        return spec.body.embeddings is None and spec.position == Learned()

    def config(self, spec: ModelSpec) -> dict[str, Any] | None:
        """The configuration, or None where a part isn't this format's."""
        layer = uniform_layer(spec, shared=self.shared)
        if layer is None:
            return None
        body, attention, head = spec.body, attention_of(layer), spec.head
        if not (
            isinstance(body, EncoderBody)
            and isinstance(layer.arrangement, PostNorm)
            and isinstance(layer.norm, LayerNorm)
            and isinstance(spec.position, Learned)
            and body.segments
            and spec.embedding_norm == layer.norm
            and activation_name(layer.feedforward)
        ):
            return None
        biased = attention.qkv_bias and attention.output_bias and layer.feedforward.bias and layer.norm.bias
        plain = attention.key_heads() == attention.heads and not (
            attention.window or attention.qk_norm or attention.score_scale
        )
        if not (biased and plain and attention.head_dim is None and self.fits(spec)):
            return None
        if isinstance(head, Classes) and not (head.dense and head.bias and head.pooling == "first"):
            return None
        return {
            "architectures": [self.architecture(head)],
            "model_type": self.model_type,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.width,
            "num_hidden_layers": len(spec.layers),
            "num_attention_heads": attention.heads,
            "intermediate_size": layer.feedforward.width,
            "hidden_act": activation_name(layer.feedforward),
            "max_position_embeddings": spec.context + spec.position.offset,
            "layer_norm_eps": layer.norm.eps,
            "type_vocab_size": body.segments,
            "tie_word_embeddings": spec.tied_head,
            **(
                {"id2label": {str(i): f"LABEL_{i}" for i in range(head.count)}}
                if isinstance(head, (Classes, TokenClasses))
                else {}
            ),
            **self.own(spec),
        }

    def own(self, spec: ModelSpec) -> dict[str, Any]:
        """Fields that relatives don't share."""
        return {}

    def modules(self, spec: ModelSpec) -> Iterator[tuple[str, str]]:
        """Every module with a weight and a bias, body first."""
        yield "encoder.embedding.norm", f"{self.prefix}embeddings.LayerNorm"
        for index in range(len(spec.layers)):
            for ours, theirs in LAYER:
                yield f"encoder.blocks.{index}.{ours}", f"{self.prefix}encoder.layer.{index}.{theirs}"

    def head_modules(self, head: Head) -> tuple[tuple[str, str], ...]:
        """The head's modules with a weight and a bias."""
        if isinstance(head, MaskedLM):
            return (*self.masked_lm, *(self.pair if head.pair else ()))
        if isinstance(head, Classes):
            return self.classes
        if isinstance(head, Hidden):
            return (self.pooler,) if head.pool else ()
        return (("head.output", "qa_outputs" if isinstance(head, Span) else "classifier"),)

    def pairs(self, spec: ModelSpec) -> Iterator[Pair]:
        """Tensor by tensor."""
        for ours, theirs in EMBEDDINGS:
            yield Pair(f"{ours}.weight", f"{self.prefix}{theirs}.weight")
        for ours, theirs in (*self.modules(spec), *self.head_modules(spec.head)):
            yield Pair(f"{ours}.weight", f"{theirs}.weight")
            yield Pair(f"{ours}.bias", f"{theirs}.bias")
        if isinstance(spec.head, MaskedLM):
            yield Pair("head.vocabulary.bias", self.vocabulary_bias)
            if not spec.tied_head:
                yield Pair("head.vocabulary.weight", f"{self.vocabulary}.weight")
                yield Pair("head.vocabulary.bias", f"{self.vocabulary}.bias")  # theirs then leaves the other unread
