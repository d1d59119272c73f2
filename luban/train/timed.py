"""Collectives of a step whose waiting counts as communication."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from luban.parallel.engine import TrainEngine
from luban.parallel.gradients import GradientSums
from luban.parallel.replicated_params import ReplicatedParams
from luban.parallel.world import World
from luban.train.goodput import Goodput


@dataclass(frozen=True)
class TimedWorld(World):
    """Processes whose collectives count as communication."""

    goodput: Goodput | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """As `World.sum`."""
        assert self.goodput is not None
        with self.goodput.spent("communication"):
            return super().sum(tensor)


@dataclass(frozen=True)
class TimedSums(GradientSums):
    """Gradient sums that count as communication."""

    goodput: Goodput | None = None

    def sum(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `GradientSums.sum`."""
        assert self.goodput is not None
        with self.goodput.spent("communication"):
            return super().sum(gradients)

    def norm(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """As `GradientSums.norm`."""
        assert self.goodput is not None
        with self.goodput.spent("communication"):
            return super().norm(gradients)


def time_communication(engine: TrainEngine, goodput: Goodput, world: World | None = None) -> None:
    """Let an engine's waiting for other processes count as communication.

    Args:
        world: the processes that it works with from now on; None: as before.
    """
    world = world or engine.world
    if isinstance(engine.params, ReplicatedParams):
        engine.params.use_world(world)
    if world.size == 1:
        engine.world, engine.sums = world, GradientSums(**{**_fields(engine.sums, GradientSums), "world": world})
        return
    engine.world = TimedWorld(**_fields(world, World), goodput=goodput)
    engine.sums = TimedSums(**{**_fields(engine.sums, GradientSums), "world": engine.world}, goodput=goodput)


def _fields(of: object, kind: type) -> dict[str, Any]:
    return {field.name: getattr(of, field.name) for field in fields(kind)}
