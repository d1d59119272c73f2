"""ALiBi (Press et al. 2022): scores fall linearly with distance, by a slope of each head's own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from luban.nn.position.family import Position, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class Alibi(Position):
    """Adds −slope · |query position − key position|; nothing is learned."""

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return AlibiPositions(slopes(shape.heads))


def slopes(heads: int) -> list[float]:
    """The slope of every head: 2^(−8i/n) for i = 1 … n, where n = `heads` is a power of two.

    For other counts, those of the next smaller power of two, and then every second one of the next larger
    (section 3 and the released code).
    """
    power = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return first + between[: heads - power]


class AlibiPositions(PositionMethod):
    """Computes the bias that a batch needs, once for all layers."""

    def __init__(self, slopes: list[float]):
        super().__init__()
        self.slopes = slopes

    def bias(self, query_positions_BT: Tensor, key_positions_BS: Tensor) -> Tensor:
        """(B, H, T, S) float32."""
        distance_BTS = (query_positions_BT[:, :, None] - key_positions_BS[:, None, :]).abs()
        slopes_H = torch.tensor(self.slopes, device=distance_BTS.device, dtype=torch.float32)
        return -slopes_H[:, None, None] * distance_BTS[:, None]
