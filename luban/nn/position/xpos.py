"""xPos (Sun et al. 2022): rotary positions whose scores also decay with distance, pair by pair.

B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.position.family import PositionMethod, PositionShape
from luban.nn.position.rope import Rope, RotaryPositions, Tables, paired


@dataclass(frozen=True, kw_only=True)
class XPos(Rope):
    """Queries at n times ζ^(n/span), keys at m times ζ^(−m/span), ζ_i = (2i + 0.4·width) / (1.4·width).

    Positions in the exponent are counted from the middle of the context: scores are the same, and the factors
    stay within half precision on both sides.
    """

    span: float = 512.0  # tokens over which pair i decays by ζ_i

    def check(self, shape: PositionShape) -> None:
        """As rotary positions; the span divides."""
        super().check(shape)
        if not self.span > 0:
            raise ConfigError(f"xPos span must be positive, {self.span} given")

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return XPosPositions(self, self.rotated(shape), shape.context)


class XPosPositions(RotaryPositions):
    """Tables for queries and, with the reciprocal decay, for keys."""

    def __init__(self, config: XPos, rotated: int, context: int):
        super().__init__(config, rotated)
        self.span, self.middle = config.span, context // 2

    def tables(self, positions_BT: Tensor) -> tuple[Tables, Tables]:
        """Cosines and sines of the queries, and of the keys."""
        cos, sin = super().tables(positions_BT)
        pairs = torch.arange(0, self.rotated, 2, device=positions_BT.device, dtype=torch.float32)
        zeta = (pairs + 0.4 * self.rotated) / (1.4 * self.rotated)
        zeta = paired(zeta, zeta, self.config.pairing)
        decay = zeta ** ((positions_BT.float()[:, None, :, None] - self.middle) / self.span)
        return (cos * decay, sin * decay), (cos / decay, sin / decay)

    def turn(self, q_BHTD: Tensor, k_BKTD: Tensor, tables: tuple[Tables, Tables]) -> tuple[Tensor, Tensor]:
        """Both rotated by the same angles, the decay in opposite directions."""
        return self.rotate(q_BHTD, tables[0]), self.rotate(k_BKTD, tables[1])
