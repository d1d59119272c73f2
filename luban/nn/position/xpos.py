"""xPos (Sun et al. 2022): rotary positions whose scores also decay with distance, pair by pair.

B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.position.base import PositionEncoding, PositionMethod, PositionShape, Rotation
from luban.nn.position.rope import CosSin, Rope, paired, rotary_cos_sin, rotate


@dataclass(frozen=True, kw_only=True)
class XPos(Rope):
    """Queries at n times ζ^(n/span), keys at m times ζ^(−m/span), ζ_i = (2i + 0.4·width) / (1.4·width).

    Positions in the exponent are counted from the middle of the context: scores are the same, and the factors
    stay within half precision on both sides.
    """

    span: float = 512.0  # tokens over which pair i decays by ζ_i

    def check(self, shape: PositionShape) -> None:
        """Raise ConfigError as for rotary positions, and if the span isn't positive."""
        super().check(shape)
        if not self.span > 0:
            raise ConfigError(f"xPos span must be positive, {self.span} given")

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return XPosPositions(self, self.rotated(shape), shape.context)


class XPosPositions(PositionMethod):
    """Module: rotation angles and decay of queries, and the reciprocal decay of keys."""

    def __init__(self, config: XPos, rotated: int, context: int):
        super().__init__()
        self.config, self.rotated, self.by_length = config, rotated, config.by_length
        self.span, self.middle = config.span, context // 2

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """Rotation and decay from positions (1 or B, T); in self-attention keys have the queries' positions."""
        cos, sin = rotary_cos_sin(self.config, positions, self.rotated)
        pairs = torch.arange(0, self.rotated, 2, device=positions.device, dtype=torch.float32)
        zeta = (pairs + 0.4 * self.rotated) / (1.4 * self.rotated)
        zeta = paired(zeta, zeta, self.config.pairing)
        decay = zeta ** ((positions.float()[:, None, :, None] - self.middle) / self.span)
        queries, keys = (cos * decay, sin * decay), (cos / decay, sin / decay)
        return PositionEncoding(rotation=XPosRotation(queries, keys, self.config.pairing))


class XPosRotation(Rotation):
    """Rotates queries and keys by the same angles, with reciprocal decay.

    Args:
        queries, keys: (1 or B, 1, T, rotated dimensions) float32 cosines and sines, multiplied by the decay.
    """

    def __init__(self, queries: CosSin, keys: CosSin, pairing: str):
        self.queries, self.keys, self.pairing = queries, keys, pairing

    def apply_rotary(self, q_BHTD: Tensor, k_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated and scaled queries (B, H, T, D) and keys (B, K, T, D)."""
        return rotate(q_BHTD, self.queries, self.pairing), rotate(k_BKTD, self.keys, self.pairing)
