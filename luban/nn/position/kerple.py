"""KERPLE (Chi et al. 2022): a learned bias from a conditionally positive definite kernel of the distance, in the
power and the logarithmic form; two numbers a head, shared by all layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luban.kernels.distance import DistanceBias, alibi_slopes, kerple_log, kerple_power
from luban.nn.position.distance import DistancePositions
from luban.nn.position.family import Position, PositionMethod, PositionShape

UNIT = math.log(math.e - 1)  # softplus of this is 1


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

    Starts at r2 = 1 and r1/√D spread evenly over (0, 2], as the authors' code, which adds the bias after the division,
    draws it. Both are held as softplus of what is learned.
    """

    def parameters(self, shape: PositionShape) -> int:
        """r1 and r2 of every head."""
        return 2 * shape.heads

    def build(self, shape: PositionShape) -> PositionMethod:
        """The module."""
        return LogPositions(shape)


class KerplePositions(DistancePositions):
    """What both forms share: `raw1` and `raw2`, one number a head each."""

    def __init__(self, shape: PositionShape):
        super().__init__(shape)
        self.scale = shape.head_dim**-0.5
        self.raw1 = nn.Parameter(torch.zeros(shape.heads))
        self.raw2 = nn.Parameter(torch.zeros(shape.heads))

    def first(self) -> Tensor:
        """(H,) r1 at the beginning."""
        raise NotImplementedError

    def draw_parameters(self, draw) -> None:
        """Fixed beginnings: nothing is drawn."""
        self.raw1.copy_(self.first().expm1().log())
        self.raw2.fill_(self.second)


class PowerPositions(KerplePositions):
    """The power form."""

    bias_form = "power"
    second = 0.0  # 2·sigmoid(0) = 1

    def first(self) -> Tensor:
        """ALiBi's slopes, times √D as the bias is divided by it."""
        return alibi_slopes(self.heads) / self.scale

    def distance_bias(self, keys: int, device: torch.device) -> DistanceBias:
        """r1 and r2 from what is learned."""
        return kerple_power(F.softplus(self.raw1.float()), 2 * self.raw2.float().sigmoid(), keys, self.scale)


class LogPositions(KerplePositions):
    """The logarithmic form."""

    bias_form = "log"
    second = UNIT

    def first(self) -> Tensor:
        """Even steps up to 2, times √D as the bias is divided by it."""
        return 2 * torch.arange(1, self.heads + 1) / self.heads / self.scale

    def distance_bias(self, keys: int, device: torch.device) -> DistanceBias:
        """r1 and r2 from what is learned."""
        return kerple_log(F.softplus(self.raw1.float()), F.softplus(self.raw2.float()), keys, self.scale)
