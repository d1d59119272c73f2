"""KERPLE (Chi et al. 2022): a learned bias from a conditionally positive definite kernel of the distance, in the
power and the logarithmic form; two numbers a head, shared by all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.kernels.distance import DistanceBias, alibi_slopes, kerple_log, kerple_power
from luban.nn.init import InitialValues
from luban.nn.position.base import Position, PositionEncoding, PositionMethod, PositionShape, distance_encoding
from luban.nn.precision import at_least_float32
from luban.nn.roles import Role


@dataclass(frozen=True, kw_only=True)
class KerplePower(Position):
    """Adds −r1·distance^r2 to q·k before the division by √D, r1 > 0 and 0 < r2 < 2 (equation 1, corollary 1).

    Starts as ALiBi: r2 = 1 and r1 so that r1/√D is ALiBi's slope. r1 is held as softplus(a), r2 as 2·sigmoid(b).
    """

    def parameters(self, shape: PositionShape) -> int:
        """r1 and r2 of every head."""
        return 2 * shape.heads

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return PowerPositions(shape)


@dataclass(frozen=True, kw_only=True)
class KerpleLog(Position):
    """Adds −r1·log(1 + r2·distance) to q·k before the division by √D, r1, r2 > 0 (equation 1, corollary 1).

    Starts next to the diagonal as ALiBi: r1/√D = 2, and r2 so that r1·r2/√D, what the first step away costs, is ALiBi's
    slope (the authors draw r1/√D from (0, 2] and r2 from (0, 1], which learns to be local more slowly). Both are held as
    softplus of what is learned.
    """

    def parameters(self, shape: PositionShape) -> int:
        """r1 and r2 of every head."""
        return 2 * shape.heads

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return LogPositions(shape)


def inverse_softplus(x: Tensor) -> Tensor:
    """Inverse of softplus, elementwise."""
    return x + torch.log(-torch.expm1(-x))


class KerplePositions(PositionMethod):
    """Base module of both forms: learned `raw1` and `raw2`, (H,) each."""

    parameter_roles: ClassVar[dict[str, Role]] = {"raw1": "position", "raw2": "position"}

    def __init__(self, shape: PositionShape):
        super().__init__()
        self.heads, self.context, self.scale = shape.heads, shape.context, shape.head_dim**-0.5
        self.raw1 = nn.Parameter(torch.zeros(shape.heads))
        self.raw2 = nn.Parameter(torch.zeros(shape.heads))

    @property
    def biased(self) -> bool:
        """Always."""
        return True

    def forward(self, positions: Tensor, key_positions: Tensor) -> PositionEncoding:
        """Bias (1 or B, H, T, S) on scores, a function of the distance.

        Args:
            positions: (1 or B, T) of the queries. key_positions: (1 or B, S). Both must be below the context
                length or below the number of keys.
        """
        reach = max(self.context, key_positions.shape[-1])
        return distance_encoding(self.distance_bias(reach), positions, key_positions)

    def distance_bias(self, keys: int) -> DistanceBias:
        """The bias for distances below `keys`, from the learned parameters."""
        raise NotImplementedError

    def initial(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Initial raw1 and raw2, (H,) each, from ALiBi's slopes (H,)."""
        raise NotImplementedError

    def draw_parameters(self, draw: InitialValues) -> None:
        """Set the fixed initial values, which aren't random."""
        raw1, raw2 = self.initial(alibi_slopes(self.heads))
        self.raw1.copy_(draw.placed("raw1", raw1, self.raw1))
        self.raw2.copy_(draw.placed("raw2", raw2, self.raw2))


class PowerPositions(KerplePositions):
    """The power form."""

    bias_form = "power"

    def initial(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """r1 = slope·√D, as the bias is divided by √D; r2 = 1."""
        return inverse_softplus(slopes / self.scale), torch.zeros_like(slopes)

    def distance_bias(self, keys: int) -> DistanceBias:
        """The bias with r1 and r2 from the learned parameters."""
        return kerple_power(
            F.softplus(at_least_float32(self.raw1)), 2 * at_least_float32(self.raw2).sigmoid(), keys, self.scale
        )


class LogPositions(KerplePositions):
    """The logarithmic form."""

    bias_form = "log"

    def initial(self, slopes: Tensor) -> tuple[Tensor, Tensor]:
        """r1 = 2·√D, as the bias is divided by √D; r2 = slope / 2."""
        return inverse_softplus(torch.full_like(slopes, 2 / self.scale)), inverse_softplus(slopes / 2)

    def distance_bias(self, keys: int) -> DistanceBias:
        """The bias with r1 and r2 from the learned parameters."""
        return kerple_log(
            F.softplus(at_least_float32(self.raw1)), F.softplus(at_least_float32(self.raw2)), keys, self.scale
        )
