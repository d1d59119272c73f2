"""Biases that depend on the distance between a query and a key alone.

A kernel adds bias[h, i − j] to a score. ALiBi and KERPLE are computed in registers from one or two numbers a head;
T5's buckets are read from a table over the distance. Where parameters are learned, their gradient is the sum over
all pairs of (gradient of the score) × (derivative of the bias at that distance), gathered in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class DistanceBias:
    """A bias for H heads over distances −(S−1) … T−1; place `zero` of a table holds distance 0."""

    form: Literal["alibi", "power", "log", "buckets"]  # how a kernel gets it
    table: Tensor  # (H, distances) float32, what is added to the scaled score; differentiable
    parameters: tuple[Tensor, ...]  # alibi: slopes (H,); KERPLE: r1, r2 (H,); buckets: weight (H, buckets)
    scale: float = 1.0  # what KERPLE's bias is multiplied by
    buckets: Tensor | None = None  # (distances,) int32: the table is parameters[0][:, buckets]
    zero: int = 0  # index of distance 0


def distances(queries: int, keys: int, device: torch.device | str) -> tuple[Tensor, int]:
    """All distances i − j as float32, smallest first, and the index of 0. Queries are the last of the keys."""
    return torch.arange(-(keys - 1), keys, device=device, dtype=torch.float32), keys - 1


def alibi_slopes(heads: int) -> Tensor:
    """(H,) slopes 2^(−8h/H), h = 1 … H; for H not a power of two, the nearest lower power's slopes and then
    every other slope of the doubled set (Press et al. 2022, section 3 and the authors' code)."""

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * h / count) for h in range(1, count + 1)]

    power = 2 ** int(math.log2(heads))
    return torch.tensor(geometric(power) + geometric(2 * power)[0::2][: heads - power])


def alibi(slopes: Tensor, queries: int, keys: int) -> DistanceBias:
    """−m_h·|i − j|, added after scaling (Press et al. 2022)."""
    delta, zero = distances(queries, keys, slopes.device)
    return DistanceBias("alibi", -slopes[:, None] * delta.abs(), (slopes,), zero=zero)


def kerple_power(r1: Tensor, r2: Tensor, queries: int, keys: int, scale: float) -> DistanceBias:
    """−r1·|i − j|^r2 inside the scaling, r1 > 0, 0 < r2 ≤ 2 (Chi et al. 2022, equation 1 and corollary 1)."""
    delta, zero = distances(queries, keys, r1.device)
    power = torch.where(delta == 0, 0.0, delta.abs().clamp(min=1) ** r2[:, None])
    return DistanceBias("power", -scale * r1[:, None] * power, (r1, r2), scale, zero=zero)


def kerple_log(r1: Tensor, r2: Tensor, queries: int, keys: int, scale: float) -> DistanceBias:
    """−r1·log(1 + r2·|i − j|) inside the scaling, r1, r2 > 0 (Chi et al. 2022, equation 1 and corollary 1)."""
    delta, zero = distances(queries, keys, r1.device)
    value = -scale * r1[:, None] * torch.log1p(r2[:, None] * delta.abs())
    return DistanceBias("log", value, (r1, r2), scale, zero=zero)


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


def t5(weight: Tensor, queries: int, keys: int, *, max_distance: int = 128, causal: bool = True) -> DistanceBias:
    """weight[h, bucket(i − j)], weight (H, buckets) learned (Raffel et al. 2020)."""
    delta, zero = distances(queries, keys, weight.device)
    index = t5_buckets(delta, weight.shape[1], max_distance, causal)
    return DistanceBias("buckets", weight[:, index.long()], (weight,), buckets=index, zero=zero)


def dense(bias: DistanceBias, queries: int, keys: int) -> Tensor:
    """(H, T, S) of the bias, for references and tests."""
    i = torch.arange(keys - queries, keys, device=bias.table.device)[:, None]
    j = torch.arange(keys, device=bias.table.device)[None]
    return bias.table[:, i - j + bias.zero]
