"""ALiBi as Falcon-RW computes it (Penedo et al. 2023, RefinedWeb; the released code), which its weights are used to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.kernels.distance import alibi_slopes
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class FalconAlibi(Position):
    """Adds slope · key position to q·k before the division by √D, slope and product rounded to bfloat16.

    Three departures from ALiBi: the bias is divided by √D as the scores are; it counts from the first token instead
    of from the query, which a softmax can't tell apart but for the rounding; and it is rounded, so that far keys
    share a bias with their neighbours.
    """

    def check(self, shape: PositionShape) -> None:
        """A bias of the key alone grows towards later tokens, so there must be none after the query."""
        if not shape.causal:
            raise ConfigError("Falcon's ALiBi favours late keys over early ones, so it needs a causal model")

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return FalconAlibiPositions(shape)


class FalconAlibiPositions(PositionMethod):
    """Computes the bias that a batch needs, once for all layers."""

    def __init__(self, shape: PositionShape):
        super().__init__()
        self.heads, self.scale = shape.heads, shape.head_dim**-0.5

    @property
    def biased(self) -> bool:
        """Always."""
        return True

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """(B, H, T, S), the same for all queries."""

        def dense() -> Tensor:
            slopes_H = alibi_slopes(self.heads).to(key_positions.device, torch.bfloat16)
            rounded_BHS = slopes_H[:, None] * key_positions[:, None, :].to(torch.bfloat16)
            return (rounded_BHS.float() * self.scale)[:, :, None].expand(-1, -1, positions.shape[-1], -1)

        return PositionEncoding(dense=dense)
