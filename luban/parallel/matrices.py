"""Matrices that the axes shard and tensor divide, as an optimizer that needs whole ones sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from luban.parallel.placement import Placements
from luban.parallel.precision import MixedPrecisionParams

if TYPE_CHECKING:
    from luban.parallel.sharded_params import ShardedParams  # FSDP is slow to import


@dataclass(frozen=True)
class Matrices:
    """The matrices of a model by the parameters' names."""

    params: MixedPrecisionParams | ShardedParams
    placements: Placements

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole matrix."""
        placement = self.placements.divided.get(name)
        return tuple(self.params.like(name).shape) if placement is None else placement.shape

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a tensor like the matrix, gathered over both axes; all processes must call it in the same order."""
        found = self.placements.whole(name, self.params.whole(name, part))
        assert found is not None  # every process has a part of a matrix
        return found

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of it."""
        return self.params.part(name, self.placements.cut(name, whole))
