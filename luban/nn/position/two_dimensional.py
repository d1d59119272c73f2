"""Two positions a token (GLM, Du et al. 2022, section 2.3): where it, or the blank it fills, stands in the text, and
where it stands inside its blank (0 outside). As learned tables (GLM) and as rotations of half a head each (ChatGLM-6B).

Positions are (B, 2, T); plain (B, T) ones count as those of text outside blanks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.embedding import Embedding
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape, Rotation
from luban.nn.position.rope import CosSin, Rope, rotary_cos_sin, rotate_pairs


def both(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The two positions (B, T) of every token."""
    if positions.dim() == 3:
        return positions[:, 0], positions[:, 1]
    return positions, torch.zeros_like(positions)


@dataclass(frozen=True, kw_only=True)
class Learned2D(Position):
    """Two tables of `context` rows, both added to the token embeddings."""

    embeds = True
    role = "embedding"
    two_dimensional = True

    def parameters(self, shape: PositionShape) -> int:
        """Both tables."""
        return 2 * shape.context * shape.width

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return Learned2DPositions(shape)


class Learned2DPositions(PositionMethod):
    """Adds a row of each table."""

    def __init__(self, shape: PositionShape):
        super().__init__()
        self.table = Embedding(shape.context, shape.width)
        self.block_table = Embedding(shape.context, shape.width)

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """(B, T, E) with the rows added."""
        text, block = both(positions_BT)
        return x_BTE + self.table(text) + self.block_table(block)


@dataclass(frozen=True, kw_only=True)
class Rope2D(Rope):
    """The first half of every head is rotated by the position in the text, the second by that in the blank."""

    two_dimensional = True

    def check(self, shape: PositionShape) -> None:
        """Each half is rotated in pairs, and whole."""
        if shape.head_dim % 4 or self.width is not None:
            raise ConfigError(
                f"two-dimensional rotary positions rotate whole heads of a width that 4 divides, {shape.head_dim} given"
            )

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return Rotary2DPositions(self, shape.head_dim // 2)


class Rotary2DPositions(PositionMethod):
    """Two rotations side by side."""

    def __init__(self, config: Rope2D, half_width: int):
        super().__init__()
        self.config, self.half_width, self.by_length = config, half_width, config.by_length

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """The rotations by either position."""
        text, block = (rotary_cos_sin(self.config, each, self.half_width) for each in both(positions))
        return PositionEncoding(rotation=Rotary2D(text, block, self.config.pairing))


class Rotary2D(Rotation):
    """The first half of every head rotated by the position in the text, the second by that in the blank."""

    def __init__(self, text: CosSin, block: CosSin, pairing: str):
        self.text, self.block, self.pairing = text, block, pairing

    def apply_rotary(self, q_BHTD: Tensor, k_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Both halves of both."""
        return self._rotate(q_BHTD), self._rotate(k_BKTD)

    def _rotate(self, x_BHTD: Tensor) -> Tensor:
        first, second = x_BHTD.chunk(2, dim=-1)
        halves = rotate_pairs(first, *self.text, self.pairing), rotate_pairs(second, *self.block, self.pairing)
        return torch.cat(halves, dim=-1)
