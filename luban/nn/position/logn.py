"""Log-n attention scaling over any position method: attention over more tokens than trained on stays as sharp.

The product of a query with its keys is multiplied by ln n / ln N, where n is the number of tokens that the query
sees and N the trained length, and never by less than 1 (Su 2021; Chiang & Cholak 2022, section 5.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape, Rotation, Wrapped
from luban.nn.position.rope import Rope
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class LogN(Position):
    """Wraps another position method."""

    inner: Position = field(default_factory=Rope)  # the method that says where a token stands
    trained: int = 512  # N, tokens

    def __post_init__(self):
        if self.trained < 2:
            raise ConfigError(f"log-n scaling needs a trained length of at least 2, {self.trained} given")

    def check(self, shape: PositionShape) -> None:
        """Sees that n is the position + 1, which holds for causal models alone."""
        if not shape.causal:
            raise ConfigError("log-n scaling counts the tokens before a query, so it needs a causal model")
        self.inner.check(shape)

    @property
    def embeds(self) -> bool:  # type: ignore[override]
        """As the inner method."""
        return self.inner.embeds

    @property
    def role(self) -> Role:  # type: ignore[override]
        """As the inner method."""
        return self.inner.role

    def parameters(self, shape: PositionShape) -> int:
        """Those of the inner method."""
        return self.inner.parameters(shape)

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return LogNPositions(self, shape)


class LogNPositions(Wrapped):
    """The inner method, with queries scaled."""

    def __init__(self, config: LogN, shape: PositionShape):
        super().__init__(config.inner.build(shape))
        self.trained = config.trained

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """The inner encoding with queries multiplied."""
        encoding = super().forward(positions, key_positions)
        seen = (positions.float() + 1)[:, None, :, None]
        factor = (seen.log() / math.log(self.trained)).clamp_min(1.0)
        return replace(encoding, rotation=ScaledQueries(encoding.rotation, factor))


class ScaledQueries(Rotation):
    """Another rotation (or none), its queries multiplied by (B, 1, T, 1) factors."""

    def __init__(self, inner: Rotation | None, factor: Tensor):
        self.inner, self.factor = inner, factor

    def apply_rotary(self, q_BHTD: Tensor, k_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated, then the queries multiplied."""
        if self.inner is not None:
            q_BHTD, k_BKTD = self.inner.apply_rotary(q_BHTD, k_BKTD)
        return (q_BHTD * self.factor).to(q_BHTD.dtype), k_BKTD
