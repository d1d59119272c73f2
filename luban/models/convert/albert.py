"""ALBERT as Hugging Face writes it (`model_type = "albert"`): narrow embeddings, layers that share their parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from luban.core.errors import ConfigError
from luban.models.convert.bert import Bert
from luban.models.convert.fields import Fields
from luban.models.encoder import EncoderBody
from luban.models.head.masked_lm import MaskedLM
from luban.models.layer import LayerSpec
from luban.models.spec import ModelSpec
from luban.nn.position.learned import Learned

LAYER = (
    ("mixer.qkv.q", "attention.query"),
    ("mixer.qkv.k", "attention.key"),
    ("mixer.qkv.v", "attention.value"),
    ("mixer.output", "attention.dense"),
    ("mixer_norm", "attention.LayerNorm"),
    ("feedforward.up", "ffn"),
    ("feedforward.down", "ffn_output"),
    ("feedforward_norm", "full_layer_layer_norm"),
)
POOLER = ("head.pool", "albert.pooler")


def grouped_layers(layer: LayerSpec, layers: int, groups: int) -> tuple[LayerSpec, ...]:
    """`layers` layers in `groups` of equal size, each group with the parameters of its first layer."""
    size = layers // groups
    return tuple(layer if i % size == 0 else replace(layer, share=i - i % size) for i in range(layers))


def _groups(spec: ModelSpec) -> int | None:
    """In how many groups of equal size the layers share parameters; None where they do otherwise."""
    groups = sum(layer.share is None for layer in spec.layers)
    fits = len(spec.layers) % groups == 0 and grouped_layers(spec.layers[0], len(spec.layers), groups) == spec.layers
    return groups if fits else None


class Albert(Bert):
    """BERT's parts; one block a group of layers."""

    ignored = re.compile(r".*position_ids|predictions\.decoder\..*|albert\.pooler\..*|sop_classifier\..*")
    shared = True
    model_type = "albert"
    default_activation = "gelu_new"
    name = "Albert"
    prefix = "albert."
    masked_lm = (("head.transform", "predictions.dense"), ("head.norm", "predictions.LayerNorm"))
    vocabulary_bias = "predictions.bias"
    pooler = POOLER
    vocabulary = "predictions.decoder"
    pair = (POOLER, ("head.pair", "sop_classifier.classifier"))
    classes = (POOLER, ("head.output", "classifier"))

    def encoder(self, fields: Fields) -> EncoderBody:
        """Narrow embeddings and groups."""
        fields.only("inner_group_num", 1)
        return EncoderBody(segments=fields.get("type_vocab_size", 2), embeddings=fields.get("embedding_size", 128))

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """BERT's, with the layers of a group sharing the parameters of its first."""
        spec = super().spec(config)
        groups, layers = Fields(config, self.model_type).get("num_hidden_groups", 1), len(spec.layers)
        if groups < 1 or layers % groups:
            raise ConfigError(f"{layers} layers can't be divided into {groups} groups evenly")
        return replace(spec, layers=grouped_layers(spec.layers[0], layers, groups))

    def fits(self, spec: ModelSpec) -> bool:
        """A dense layer behind the embeddings."""
        assert isinstance(spec.body, EncoderBody)
        if isinstance(spec.head, MaskedLM) and spec.head.activation is not None:
            return False
        return spec.body.embeddings is not None and spec.position == Learned() and _groups(spec) is not None

    def own(self, spec: ModelSpec) -> dict[str, Any]:
        """Embedding width and groups."""
        assert isinstance(spec.body, EncoderBody)
        return {"embedding_size": spec.body.embeddings, "inner_group_num": 1, "num_hidden_groups": _groups(spec)}

    def modules(self, spec: ModelSpec) -> Iterator[tuple[str, str]]:
        """Block by group."""
        groups = _groups(spec)
        assert groups is not None
        yield "encoder.embedding.norm", "albert.embeddings.LayerNorm"
        yield "encoder.embedding.widen", "albert.encoder.embedding_hidden_mapping_in"
        for group in range(groups):
            first = group * (len(spec.layers) // groups)
            for ours, theirs in LAYER:
                yield (
                    f"encoder.blocks.{first}.{ours}",
                    f"albert.encoder.albert_layer_groups.{group}.albert_layers.0.{theirs}",
                )
