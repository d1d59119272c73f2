"""Two positions a token (GLM, Du et al. 2022, section 2.3): where it, or the blank it fills, stands in the text, and
where it stands inside its blank (0 outside). As learned tables (GLM) and as rotations of half a head each (ChatGLM-6B).

Positions are (B, 2, T); plain (B, T) ones count as those of text outside blanks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from luban.core.errors import ConfigError
from luban.nn.position.family import Position, PositionMethod, PositionShape
from luban.nn.position.rope import Rope, Tables, rotary_tables, rotate_pairs


def both(positions: Tensor) -> tuple[Tensor, Tensor]:
    """The two positions (B, T) of every token."""
    if positions.dim() == 3:
        return positions[:, 0], positions[:, 1]
    return positions, torch.zeros_like(positions)


@dataclass(frozen=True, kw_only=True)
class Learned2D(Position):
    """Two tables of `context` rows, both added to the token embeddings."""

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
        self.table = nn.Embedding(shape.context, shape.width)
        self.block_table = nn.Embedding(shape.context, shape.width)

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """(B, T, E) with the rows added."""
        text, block = both(positions_BT)
        return x_BTE + self.table(text) + self.block_table(block)


@dataclass(frozen=True, kw_only=True)
class Rope2D(Rope):
    """The first half of every head is rotated by the position in the text, the second by that in the blank."""

    def check(self, shape: PositionShape) -> None:
        """Each half is rotated in pairs, and whole."""
        if shape.head_dim % 4 or self.width is not None:
            raise ConfigError(f"two-dimensional rotary positions turn whole heads of a width that 4 divides, "
                              f"{shape.head_dim} given")  # fmt: skip

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return Rotary2DPositions(self, shape.head_dim // 2)


class Rotary2DPositions(PositionMethod):
    """Two rotations side by side."""

    def __init__(self, config: Rope2D, half: int):
        super().__init__()
        self.config, self.half = config, half

    def tables(self, positions_BT: Tensor) -> tuple[Tables, Tables]:
        """Cosines and sines of either position."""
        text, block = both(positions_BT)
        return rotary_tables(self.config, text, self.half), rotary_tables(self.config, block, self.half)

    def turn(self, q_BHTD: Tensor, k_BKTD: Tensor, tables: tuple[Tables, Tables]) -> tuple[Tensor, Tensor]:
        """Both halves of both."""
        text, block = tables

        def rotate(x: Tensor) -> Tensor:
            a, b = x.chunk(2, dim=-1)
            pairing = self.config.pairing
            return torch.cat((rotate_pairs(a, *text, pairing), rotate_pairs(b, *block, pairing)), dim=-1)

        return rotate(q_BHTD), rotate(k_BKTD)
