"""Log-n attention scaling over any position method: attention over more tokens than trained on stays as sharp.

The product of a query with its keys is multiplied by ln n / ln N, where n is the number of tokens that the query
sees and N the trained length, and never by less than 1 (Su 2021; Chiang & Cholak 2022, section 5.3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from luban.core.errors import ConfigError
from luban.nn.position.family import Position, PositionMethod, PositionShape, Wrapped
from luban.nn.position.rope import Rope


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

    def tables(self, positions_BT: Tensor) -> tuple[Any, Tensor]:
        """The inner tables and the factors (B, 1, T, 1)."""
        seen = (positions_BT.float() + 1)[:, None, :, None]
        return super().tables(positions_BT), (seen.log() / math.log(self.trained)).clamp_min(1.0)

    def turn(self, q_BHTD: Tensor, k_BKTD: Tensor, tables: tuple[Any, Tensor]) -> tuple[Tensor, Tensor]:
        """Turned as by the inner method, the queries multiplied."""
        inner, factor = tables
        q_BHTD, k_BKTD = super().turn(q_BHTD, k_BKTD, inner)
        return (q_BHTD * factor).to(q_BHTD.dtype), k_BKTD
