"""Prefix tuning and P-tuning v2: trained keys and values before every text, in all layers (Li & Liang 2021, section 4;
Liu et al. 2022, section 3).

P prefix tokens, L layers, K key heads, D head dim, M width of the reparameterising network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.adapters.base import Adapter, AdapterConfig
from luban.core.errors import ConfigError, UnsupportedError
from luban.core.protocols import KeysValues
from luban.models.base import Model
from luban.models.decoder import Decoder, Prompts
from luban.models.spec import ModelSpec
from luban.nn.init import InitialValues
from luban.nn.mixer.base import AttentionShape
from luban.nn.position.base import PositionMethod
from luban.nn.roles import Role


def require_prompts(spec: ModelSpec, what: str) -> None:
    """Raise UnsupportedError unless keys and values can stand before a model's texts."""
    if not (spec.body.stacked and spec.body.causal):
        raise UnsupportedError(f"{what} needs a decoder: in other models its tokens would be among those that are read")
    shapes = {layer.mixer.attention(spec.width) for layer in spec.layers}
    if None in shapes or len({shape[1:3] for shape in shapes if shape is not None}) > 1:
        raise UnsupportedError(f"{what} needs layers that all attend with the same key heads")
    if not all(layer.mixer.sees_prefix for layer in spec.layers):
        raise UnsupportedError(f"{what} needs layers in which every token can attend to it (mixer grouped)")
    if any(shape.layout is not None for shape in shapes if shape is not None):
        raise UnsupportedError(f"{what} doesn't go with a block-sparse layout")


def require_unbiased(model: Model, what: str) -> None:
    """Raise UnsupportedError for positions that add a bias by distance, which the prefix would lack."""
    if any(isinstance(part, PositionMethod) and part.biased for part in model.modules()):
        raise UnsupportedError(f"{what} doesn't go with positions that add a bias to scores (ALiBi, T5's and the like)")


@dataclass(frozen=True, kw_only=True)
class PTuningV2(AdapterConfig):
    """Keys and values of every layer as parameters."""

    peft = "PREFIX_TUNING"
    pages = False
    length: int = 20  # P, prefix tokens

    def __post_init__(self):
        if self.length < 1:
            raise ConfigError(f"adapter.length must be at least 1, {self.length} given")

    @property
    def hidden(self) -> int:
        """M; 0: there is no reparameterising network."""
        return 0

    def check(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError for a model that can't have a prefix."""
        require_prompts(spec, "a prefix")

    def insert(self, model: Model) -> None:
        """Put the prefix before the decoder's texts."""
        require_unbiased(model, "a prefix")
        shape = model.spec.layers[0].mixer.attention(model.spec.width)
        assert isinstance(model, Decoder) and shape is not None
        model.add_prompts(Prefix(self.length, len(model.spec.layers), shape, self.hidden))


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PTuningV2):
    """The same, its parameters made by a network of two layers in training; what is exported are keys and values alone."""

    network: int = 512  # M, its inner width

    def __post_init__(self):
        super().__post_init__()
        if self.network < 1:
            raise ConfigError(
                f"adapter.network must be at least 1, {self.network} given; p_tuning_v2 is the kind without a network"
            )

    @property
    def hidden(self) -> int:
        """M."""
        return self.network


class Prefix(Adapter, Prompts):
    """Keys and values, P·L·2·K·D parameters; reparameterised P·M + (M² + M) + M·2LKD + 2LKD (PEFT's PrefixEncoder at M =
    width)."""

    parameter_roles: ClassVar[dict[str, Role]] = {
        "embedding": "adapter",
        "first": "adapter",
        "first_bias": "bias",
        "second": "adapter",
        "second_bias": "bias",
    }

    def __init__(self, length: int, layers: int, shape: AttentionShape, hidden: int):
        super().__init__()
        self.layers, self.heads, self.head_dim = layers, shape.key_heads, shape.head_dim
        out = layers * 2 * shape.key_heads * shape.head_dim
        self.embedding = nn.Parameter(torch.empty(length, hidden or out))
        self.reparameterised = bool(hidden)
        if hidden:
            self.first, self.first_bias = nn.Parameter(torch.empty(hidden, hidden)), nn.Parameter(torch.empty(hidden))
            self.second, self.second_bias = nn.Parameter(torch.empty(out, hidden)), nn.Parameter(torch.empty(out))

    def draw_parameters(self, draw: InitialValues) -> None:
        """Normal: embeddings with deviation 1 (0.02 without a network), matrices with 1/√inputs; biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.zero_()
                continue
            std = 1 / math.sqrt(parameter.shape[1]) if name != "embedding" else 1.0 if self.reparameterised else 0.02
            parameter.copy_(draw.normal(name, parameter, std))

    def values(self) -> Tensor:
        """(P, L·2·K·D), the order in which PEFT keeps them."""
        if not self.reparameterised:
            return self.embedding
        inner = torch.tanh(F.linear(self.embedding, self.first, self.first_bias))
        return F.linear(inner, self.second, self.second_bias)

    def forward(self, decoder: Decoder) -> Mapping[int, KeysValues]:
        """Layer → keys and values (1, K, P, D)."""
        parts = self.values().view(-1, self.layers, 2, self.heads, self.head_dim).permute(1, 2, 3, 0, 4)
        return {layer: (keys[None], values[None]) for layer, (keys, values) in enumerate(parts)}
