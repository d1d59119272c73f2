"""ALBERT as Hugging Face writes it (`model_type = "albert"`): narrow embeddings, layers that share their parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from luban.models.convert.bert import Bert
from luban.models.convert.family import Fields
from luban.models.encoder import EncoderBody
from luban.models.spec import ModelSpec
from luban.nn.position.learned import Learned

LAYER = (
    ("attention.q", "attention.query"),
    ("attention.k", "attention.key"),
    ("attention.v", "attention.value"),
    ("attention.output", "attention.dense"),
    ("attention_norm", "attention.LayerNorm"),
    ("feedforward.up", "ffn"),
    ("feedforward.down", "ffn_output"),
    ("feedforward_norm", "full_layer_layer_norm"),
)
POOLER = ("readout.pool", "albert.pooler")


class Albert(Bert):
    """BERT's parts; one block a group of layers."""

    ignored = re.compile(r".*position_ids|predictions\.decoder\..*|albert\.pooler\..*|sop_classifier\..*")
    model_type = "albert"
    default_activation = "gelu_new"
    name = "Albert"
    prefix = "albert."
    masked_lm = (("readout.transform", "predictions.dense"), ("readout.norm", "predictions.LayerNorm"))
    vocabulary_bias = "predictions.bias"
    pooler = POOLER
    vocabulary = "predictions.decoder"
    pair = (POOLER, ("readout.pair", "sop_classifier.classifier"))
    classes = (POOLER, ("readout.output", "classifier"))

    def encoder(self, fields: Fields) -> EncoderBody:
        """Narrow embeddings and groups."""
        fields.only("inner_group_num", 1)
        return EncoderBody(segments=fields.get("type_vocab_size", 2),
                           embedding_width=fields.get("embedding_size", 128),
                           groups=fields.get("num_hidden_groups", 1))  # fmt: skip

    def fits(self, spec: ModelSpec) -> bool:
        """A dense layer behind the embeddings."""
        assert isinstance(spec.body, EncoderBody)
        return spec.body.embedding_width is not None and spec.position == Learned()

    def own(self, spec: ModelSpec) -> dict[str, Any]:
        """Embedding width and groups."""
        assert isinstance(spec.body, EncoderBody)
        return {"embedding_size": spec.body.embedding_width, "inner_group_num": 1,
                "num_hidden_groups": spec.body.groups or spec.layers}  # fmt: skip

    def modules(self, spec: ModelSpec) -> Iterator[tuple[str, str]]:
        """Block by group."""
        assert isinstance(spec.body, EncoderBody)
        yield "embedding_norm", "albert.embeddings.LayerNorm"
        yield "widen", "albert.encoder.embedding_hidden_mapping_in"
        for group in range(spec.body.groups or spec.layers):
            for ours, theirs in LAYER:
                yield f"blocks.{group}.{ours}", f"albert.encoder.albert_layer_groups.{group}.albert_layers.0.{theirs}"
