"""ALiBi (Press et al. 2022): scores fall linearly with distance, by a slope of each head's own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luban.kernels.distance import alibi, alibi_slopes
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class Alibi(Position):
    """Adds −slope · |query position − key position|; nothing is learned."""

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return AlibiPositions(shape)


class AlibiPositions(PositionMethod):
    """Module of the bias. H heads, T queries, S keys."""

    bias_form = "alibi"

    def __init__(self, shape: PositionShape):
        super().__init__()
        self.heads = shape.heads

    @property
    def biased(self) -> bool:
        """Always."""
        return True

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """Bias −slope · |distance| (1 or B, H, T, S) on scores.

        Args:
            positions: (1 or B, T) of the queries. key_positions: (1 or B, S).
        """
        slopes_H = alibi_slopes(self.heads, key_positions.device)

        def dense() -> Tensor:
            distance_BTS = (positions[:, :, None] - key_positions[:, None, :]).abs()
            return -slopes_H[:, None, None] * distance_BTS[:, None]

        return PositionEncoding(distance_bias=alibi(slopes_H, key_positions.shape[-1]), dense=dense)
