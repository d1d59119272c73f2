"""Randomised positions (Ruoss et al. 2023) over any position method: a sequence of n tokens stands at n distinct
positions drawn from a much longer range, in order, so that the positions of long sequences are known from short ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape, Wrapped
from luban.nn.position.rope import Rope
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class Randomised(Position):
    """Wraps another position method."""

    inner: Position = field(default_factory=Rope)  # the method that works with the drawn positions
    longest: int = 2048  # L, positions to draw from; at least the context

    def check(self, shape: PositionShape) -> None:
        """Distinct positions must suffice for the context."""
        if self.longest < shape.context:
            raise ConfigError(
                f"randomised positions need longest ≥ the context of {shape.context}, {self.longest} given"
            )
        self.inner.check(replace(shape, context=self.longest))

    @property
    def embeds(self) -> bool:  # type: ignore[override]
        """As the inner method."""
        return self.inner.embeds

    @property
    def role(self) -> Role:  # type: ignore[override]
        """As the inner method."""
        return self.inner.role

    def parameters(self, shape: PositionShape) -> int:
        """Those of the inner method over the whole range."""
        return self.inner.parameters(replace(shape, context=self.longest))

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return RandomisedPositions(self, shape)


class RandomisedPositions(Wrapped):
    """Draws positions once a forward, the same for all its rows.

    In training every forward draws anew (torch's own generator). In evaluation the draw is a function of the
    sequence's length alone; with a cache, where the length isn't known yet, of the context's.
    """

    def __init__(self, config: Randomised, shape: PositionShape):
        super().__init__(config.inner.build(replace(shape, context=config.longest)))
        self.longest, self.context = config.longest, shape.context
        self.bias_form = None  # drawn positions leave gaps

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """The inner encoding; its bias is no function of the distance between slots any more."""
        return replace(super().forward(positions, key_positions), distance_bias=None)

    def draw(self, count: int, device: torch.device) -> Tensor:
        """(count,) distinct positions below `longest`, in order."""
        generator = None if self.training else torch.Generator().manual_seed(count)
        return torch.randperm(self.longest, generator=generator)[:count].sort().values.to(device)

    def map_positions(self, positions: Tensor, key_positions: Tensor, *, cached: bool) -> tuple[Tensor, Tensor]:
        """Counted positions → drawn ones."""
        count = self.context if cached else key_positions.shape[-1]
        if count > self.longest:
            raise ConfigError(f"{count} tokens are more than the {self.longest} positions to draw from")
        drawn = self.draw(count, positions.device)
        return super().map_positions(drawn[positions], drawn[key_positions], cached=cached)
