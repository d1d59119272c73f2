"""Relative biases in buckets of the distance (Raffel et al. 2020, T5, section 2.1), shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.kernels.distance import t5
from luban.nn.init import InitialValues
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape, distance_encoding
from luban.nn.precision import at_least_float32
from luban.nn.roles import Role

INITIAL_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class RelativeBias(Position):
    """A learned bias per head and bucket of distances, added to the scores; buckets widen with the distance."""

    role = "embedding"
    buckets: int = 32  # bidirectional models use half of them for each direction
    max_distance: int = 128  # tokens; all farther ones share the last bucket

    def __post_init__(self):
        if self.buckets < 4 or self.buckets % 4:
            raise ConfigError(f"relative buckets must be a multiple of 4, {self.buckets} given")
        single = self.buckets // 2  # hold one distance each where only earlier tokens are seen
        if self.max_distance <= single:
            raise ConfigError(
                f"max_distance must be larger than half of the {self.buckets} buckets, {self.max_distance} given"
            )

    def parameters(self, shape: PositionShape) -> int:
        """Of the weight (buckets, H)."""
        return self.buckets * shape.heads

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return RelativePositions(self, shape)


class RelativePositions(PositionMethod):
    """Owns the weight (buckets, H)."""

    bias_form = "buckets"
    parameter_roles: ClassVar[dict[str, Role]] = {"weight": "embedding"}

    def __init__(self, config: RelativeBias, shape: PositionShape):
        super().__init__()
        self.context, self.causal, self.max_distance = shape.context, shape.causal, config.max_distance
        self.weight = nn.Parameter(torch.empty(config.buckets, shape.heads))

    @property
    def biased(self) -> bool:
        """Always."""
        return True

    def draw_parameters(self, draw: InitialValues) -> None:
        """Standard deviation 0.02, as token embeddings."""
        self.weight.copy_(draw.normal("weight", self.weight, INITIAL_STD))

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """Bias (1 or B, H, T, S) on scores, a function of the distance.

        Args:
            positions: (1 or B, T) of the queries. key_positions: (1 or B, S). Both must be below the context
                length or below the number of keys.
        """
        reach = max(self.context, key_positions.shape[-1])
        bias = t5(at_least_float32(self.weight).t(), reach, max_distance=self.max_distance, causal=self.causal)
        return distance_encoding(bias, positions, key_positions)
