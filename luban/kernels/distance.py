"""Biases that depend on the distance between a query and a key alone.

A kernel adds bias[h, i − j] to a score. ALiBi and KERPLE are computed in registers from one or two numbers a head;
T5's buckets are read from a table over the distance. Where parameters are learned, their gradient is the sum over
all pairs of (gradient of the score) × (derivative of the bias at that distance), gathered in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class DistanceBias:
    """A bias for H heads over distances −(S−1) … S−1, S = `keys`."""

    form: Literal["alibi", "power", "log", "buckets"]
    keys: int  # S, distances reach to S − 1 on either side
    parameters: tuple[Tensor, ...]  # alibi: slopes (H,); KERPLE: r1, r2 (H,); buckets: weight (H, buckets)
    scale: float = 1.0  # what KERPLE's bias is multiplied by
    buckets: Tensor | None = None  # (2S − 1,) int32: the bucket of every distance
    reach: int = 0  # buckets: from this distance on (in both directions) all are in one bucket

    @property
    def zero(self) -> int:
        """The place of distance 0 among all distances, smallest first."""
        return self.keys - 1

    def numbers(self) -> Tensor | None:
        """(H, 2) float32: the two numbers of a head that give its bias in base 2, differentiable; none of buckets."""
        if self.form == "buckets":
            return None
        if self.form == "alibi":
            return torch.stack([self.parameters[0].float() * LOG2E] * 2, 1)
        r1, r2 = (p.float() for p in self.parameters)
        return torch.stack([r1 * self.scale * (LOG2E if self.form == "power" else 1.0), r2], 1)

    def table(self) -> Tensor:
        """(H, 2S − 1) of what is added to the scaled score at every distance, differentiable."""
        if self.form == "buckets":
            assert self.buckets is not None
            return self.parameters[0][:, self.buckets.long()]
        away = torch.arange(-self.zero, self.keys, device=self.parameters[0].device, dtype=torch.float32).abs()
        if self.form == "alibi":
            return -self.parameters[0][:, None] * away
        r1, r2 = (p[:, None] for p in self.parameters)
        if self.form == "log":
            return -self.scale * r1 * torch.log1p(r2 * away)
        return -self.scale * r1 * torch.where(away == 0, 0.0, away.clamp(min=1) ** r2)

    def times(self, factor: Tensor) -> DistanceBias:
        """With its parameters multiplied."""
        return replace(self, parameters=tuple(p * factor for p in self.parameters))


def alibi_slopes(heads: int, device: torch.device | str = "cpu") -> Tensor:
    """(H,) slopes 2^(−8h/H), h = 1 … H; for H not a power of two, the nearest lower power's slopes and then
    every other slope of the doubled set (Press et al. 2022, section 3 and the authors' code)."""
    power = 2 ** int(math.log2(heads))
    h = torch.arange(heads, device=device, dtype=torch.float64)
    return torch.exp2(torch.where(h < power, -8 * (h + 1), -8 * (h - power) - 4) / power).float()


def alibi(slopes: Tensor, keys: int) -> DistanceBias:
    """−m_h·|i − j|, added after scaling (Press et al. 2022)."""
    return DistanceBias("alibi", keys, (slopes,))


def kerple_power(r1: Tensor, r2: Tensor, keys: int, scale: float) -> DistanceBias:
    """−r1·|i − j|^r2 inside the scaling, r1 > 0, 0 < r2 ≤ 2 (Chi et al. 2022, equation 1 and corollary 1)."""
    return DistanceBias("power", keys, (r1, r2), scale)


def kerple_log(r1: Tensor, r2: Tensor, keys: int, scale: float) -> DistanceBias:
    """−r1·log(1 + r2·|i − j|) inside the scaling, r1, r2 > 0 (Chi et al. 2022, equation 1 and corollary 1)."""
    return DistanceBias("log", keys, (r1, r2), scale)


def t5_buckets(delta: Tensor, buckets: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket of each distance i − j, int32 (Raffel et al. 2020, section 2.1 and the authors' code): half of
    the buckets hold one distance each, the other half widen logarithmically up to `max_distance`; a model that
    looks both ways spends half of all on either side."""
    offset = torch.zeros_like(delta, dtype=torch.int64)
    if not causal:
        buckets //= 2
        offset = (delta < 0) * buckets
    away = delta.abs() if not causal else delta.clamp(min=0)
    exact = buckets // 2
    far = exact + (torch.log(away.clamp(min=1) / exact) / math.log(max_distance / exact) * (buckets - exact)).long()
    return (offset + torch.where(away < exact, away.long(), far.clamp(max=buckets - 1))).to(torch.int32)


def t5(weight: Tensor, keys: int, *, max_distance: int = 128, causal: bool = True) -> DistanceBias:
    """weight[h, bucket(i − j)], weight (H, buckets) learned (Raffel et al. 2020)."""
    delta = torch.arange(-(keys - 1), keys, device=weight.device, dtype=torch.float32)
    index = t5_buckets(delta, weight.shape[1], max_distance, causal)
    return DistanceBias("buckets", keys, (weight,), buckets=index, reach=max_distance)


def dense(bias: DistanceBias, queries: int, keys: int) -> Tensor:
    """(H, T, S) of the bias, for references and tests."""
    i = torch.arange(keys - queries, keys, device=bias.parameters[0].device)[:, None]
    j = torch.arange(keys, device=i.device)[None]
    return bias.table()[:, i - j + bias.zero]
