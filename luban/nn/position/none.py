"""No positions: a causal model learns order from the mask alone (Haviv et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass

from luban.nn.position.base import Position, PositionMethod, PositionShape


@dataclass(frozen=True, kw_only=True)
class NoPosition(Position):
    """Adds nothing anywhere."""

    two_dimensional = True  # it reads none

    def build(self, shape: PositionShape) -> PositionMethod:
        """A method that does nothing."""
        return PositionMethod()
