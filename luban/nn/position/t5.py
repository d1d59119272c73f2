"""Relative biases in buckets of the distance (Raffel et al. 2020, T5, section 2.1), shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from luban.core.errors import ConfigError
from luban.kernels.distance import DistanceBias, t5
from luban.nn.position.distance import DistancePositions
from luban.nn.position.family import Position, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class RelativeBias(Position):
    """One learned number a head and bucket, added to the scores; buckets widen with the distance."""

    buckets: int = 32  # of which bidirectional models spend half on either side
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
        """The table."""
        return self.buckets * shape.heads

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return RelativePositions(self, shape)


class RelativePositions(DistancePositions):
    """Holds the table (buckets, H)."""

    bias_form = "buckets"

    def __init__(self, config: RelativeBias, shape: PositionShape):
        super().__init__(shape)
        self.max_distance = config.max_distance
        self.table = nn.Embedding(config.buckets, shape.heads)

    def distance_bias(self, keys: int, device: torch.device) -> DistanceBias:
        """The learned table over buckets."""
        weight = self.table.weight.float().t()
        return t5(weight, keys, max_distance=self.max_distance, causal=self.causal)
