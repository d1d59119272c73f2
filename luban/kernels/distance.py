"""Biases that depend on the distance between a query and a key alone, as tables over the distance.

A kernel adds table[h, i − j] to a score. The gradient of a learned parameter is the sum over all pairs of
(gradient of the score) × (derivative of the bias at that distance), so a bias also gives those derivatives as
tables: `moments`. Buckets (T5) are summed bucket by bucket instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DistanceBias:
    """A bias for H heads over distances −(S−1) … T−1; place `zero` of a table holds distance 0."""

    table: Tensor  # (H, distances) float32, what is added to the scaled score
    moments: tuple[Tensor, ...] = ()  # each (H, distances): derivatives by the parameters behind the table
    parameters: tuple[Tensor, ...] = ()  # each (H,), aligned with moments
    buckets: Tensor | None = None  # (distances,) int32: the table is parameters[0][:, buckets]
    slopes: Tensor | None = None  # (H,): the table is −slope·distance; a kernel needs no table then
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
    return DistanceBias(-slopes[:, None] * delta.abs(), slopes=slopes, zero=zero)


def kerple_power(r1: Tensor, r2: Tensor, queries: int, keys: int, scale: float) -> DistanceBias:
    """−r1·|i − j|^r2 inside the scaling, r1 > 0, 0 < r2 ≤ 2 (Chi et al. 2022, equation 1 and corollary 1)."""
    delta, zero = distances(queries, keys, r1.device)
    size = delta.abs().clamp(min=1e-30)
    power = torch.where(delta == 0, 0.0, size ** r2.detach()[:, None])
    value = -scale * r1.detach()[:, None] * power
    return DistanceBias(value, (-scale * power, value * size.log()), (r1, r2), zero=zero)


def kerple_log(r1: Tensor, r2: Tensor, queries: int, keys: int, scale: float) -> DistanceBias:
    """−r1·log(1 + r2·|i − j|) inside the scaling, r1, r2 > 0 (Chi et al. 2022, equation 1 and corollary 1)."""
    delta, zero = distances(queries, keys, r1.device)
    inner = 1 + r2.detach()[:, None] * delta.abs()
    by_r1 = -scale * inner.log()
    return DistanceBias(by_r1 * r1.detach()[:, None], (by_r1, -scale * r1.detach()[:, None] * delta.abs() / inner),
                        (r1, r2), zero=zero)  # fmt: skip


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
    return DistanceBias(weight.detach()[:, index.long()], parameters=(weight,), buckets=index, zero=zero)


def differentiable(bias: DistanceBias) -> Tensor:
    """(H, distances) with the values of the table, and with gradients for the parameters behind it."""
    if bias.buckets is not None:
        return bias.parameters[0][:, bias.buckets.long()]
    table = bias.table
    for moment, parameter in zip(bias.moments, bias.parameters, strict=True):
        table = table + moment * (parameter - parameter.detach())[:, None]
    return table


def dense(bias: DistanceBias, queries: int, keys: int) -> Tensor:
    """(H, T, S) of the bias, for references and tests; not differentiable."""
    i = torch.arange(keys - queries, keys, device=bias.table.device)[:, None]
    j = torch.arange(keys, device=bias.table.device)[None]
    return bias.table[:, i - j + bias.zero]
