"""A mesh of devices with two axes, and what it costs to change a tensor's spec on it.

Axis 0 joins devices that are axis 1's size apart, axis 1 neighbours. Resharding: an axis that a tensor loses takes an all-gather, one
that moves to another dimension an all-to-all, one that it gains nothing (each device keeps a part). The gradient goes the other
way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from luban.planner.search.messages import Axis
from luban.planner.sharding.ir import Spec, Value

if TYPE_CHECKING:
    from luban.planner.search.messages import Collective, Messages


@dataclass(frozen=True)
class Mesh:
    """Devices as `sizes[0]` × `sizes[1]`."""

    messages: Messages
    sizes: tuple[int, int]
    known: dict[tuple[object, ...], float] = field(default_factory=dict, compare=False)

    def seconds(self, collective: Collective, size: float, axis: int) -> float:
        """Of a collective along one axis."""
        return self.messages.seconds(collective, size, Axis(self.sizes[axis], 1 if axis else self.sizes[1]))

    def parts(self, spec: Spec) -> int:
        """Pieces that a tensor is cut into."""
        return prod(self.sizes[axis] for dim in spec for axis in dim)

    def reshard(self, value: Value, before: Spec, after: Spec) -> float:
        """Seconds of a tensor's way from one spec to another, and of its gradient back."""
        if before == after:
            return 0.0
        key = (value.sizes, value.itemsize, before, after)
        if key not in self.known:
            gradient = self._one_way(value, after, before)
            self.known[key] = self._one_way(value, before, after) + gradient
        return self.known[key]

    def _one_way(self, value: Value, before: Spec, after: Spec) -> float:
        seconds, held = 0.0, value.bytes / self.parts(before)
        for axis in (1, 0):
            here, there = _dimension(before, axis), _dimension(after, axis)
            if here is None or here == there:
                continue
            if there is None:
                held *= self.sizes[axis]
                seconds += self.seconds("all-gather", held, axis)
            else:
                seconds += self.seconds("all-to-all", held, axis)
        return seconds


def _dimension(spec: Spec, axis: int) -> int | None:
    """The dimension that an axis divides."""
    return next((number for number, dim in enumerate(spec) if axis in dim), None)
