"""No positions: a causal model learns order from the mask alone (Haviv et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from luban.nn.position.family import Position, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class NoPosition(Position):
    """Adds nothing anywhere."""

    def build(self, shape: PositionShape) -> PositionMethod:
        """A method whose every way in does nothing."""
        return PositionMethod()
