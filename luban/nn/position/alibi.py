"""ALiBi (Press et al. 2022): scores fall linearly with distance, by a slope of each head's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luban.kernels.distance import DistanceBias, alibi, alibi_slopes
from luban.nn.position.family import Position, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class Alibi(Position):
    """Adds −slope · |query position − key position|; nothing is learned."""

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return AlibiPositions(shape.heads)


class AlibiPositions(PositionMethod):
    """Computes the bias that a batch needs, once for all layers."""

    bias_form = "alibi"

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def distance_bias(self, keys: int, device: torch.device) -> DistanceBias:
        """The slopes."""
        return alibi(alibi_slopes(self.heads, device), keys)

    def bias(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor:
        """(B, H, T, S) float32."""
        distance_BTS = (query_positions_BT[:, :, None] - key_positions_BS[:, None, :]).abs()
        slopes_H = alibi_slopes(self.heads, distance_BTS.device)
        return -slopes_H[:, None, None] * distance_BTS[:, None]
