"""A learned vector a position (Gehring et al. 2017; GPT, BERT)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from luban.nn.embedding import Embedding
from luban.nn.position.base import Position, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class Learned(Position):
    """A table of `context` rows, added to the token embeddings."""

    embeds = True
    role = "embedding"
    offset: int = 0  # rows before that of position 0, which are never read (RoBERTa and BART: 2)

    def parameters(self, shape: PositionShape) -> int:
        """The table."""
        return (shape.context + self.offset) * shape.width

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module with its table."""
        return LearnedPositions(shape, self.offset)


class LearnedPositions(PositionMethod):
    """Adds row p + offset of the table to a token at position p."""

    def __init__(self, shape: PositionShape, offset: int):
        super().__init__()
        self.offset = offset
        self.table = Embedding(shape.context + offset, shape.width)

    def embed(self, x_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """(B, T, E) with the rows added."""
        return x_BTE + self.table(positions_BT + self.offset)
