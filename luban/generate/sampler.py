"""From logits to tokens, all rows at once and on the device; B rows, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from luban.core.seeding import derive
from luban.generate.sampling import Sampling
from luban.nn.host_copies import sent

DRAW_RANGE = 2.0**63


def top_k(sorted_BV: Tensor, k_B1: Tensor) -> Tensor:
    """Sorted probabilities with all but the k largest of each row set to 0; k = 0 keeps all."""
    ranks = torch.arange(sorted_BV.shape[-1], device=sorted_BV.device)
    return torch.where((ranks < k_B1) | (k_B1 == 0), sorted_BV, 0)


def top_p(sorted_BV: Tensor, p_B1: Tensor) -> Tensor:
    """Nucleus (Holtzman et al. 2020): the shortest head of sorted probabilities whose sum reaches p of the whole."""
    before = sorted_BV.cumsum(-1) - sorted_BV
    return torch.where((before < p_B1 * sorted_BV.sum(-1, keepdim=True)) | (p_B1 >= 1), sorted_BV, 0)


def min_p(sorted_BV: Tensor, p_B1: Tensor) -> Tensor:
    """Sorted probabilities below p times the first set to 0 (Nguyen et al. 2024)."""
    return torch.where(sorted_BV >= p_B1 * sorted_BV[:, :1], sorted_BV, 0)


def uniform(seed: int, choice: int, step: int) -> float:
    """A number in [0, 1) that depends on the request's seed, the continuation and the step, and on nothing else."""
    return derive(seed, "sample", choice, step) / DRAW_RANGE


class Drawn(NamedTuple):
    """Tokens and how likely it was that they came."""

    tokens_B: Tensor  # int64
    logprobs_B: Tensor  # under the distribution that was drawn from, nats; 0 where the choice was greedy


def draw(logits_BV: Tensor, sampling: Sequence[Sampling], quantiles: Sequence[float]) -> Drawn:
    """Tokens at the `quantiles` (in [0, 1)) of each row's tempered and filtered distribution, likeliest tokens first.

    Filters apply in the order temperature, top-k, top-p, min-p, each to what the one before left. A row with
    temperature 0 (or below LEAST_TEMPERATURE) is greedy. A row doesn't depend on the others; of one with NaN any token may come.
    """
    if all(s.greedy for s in sampling):
        return Drawn(logits_BV.argmax(-1), logits_BV.new_zeros(len(logits_BV)))

    numbers = [
        [1.0 if s.greedy else s.temperature for s in sampling],
        [1 if s.greedy else s.top_k for s in sampling],
        [s.top_p for s in sampling],
        [s.min_p for s in sampling],
        quantiles,
    ]
    columns = sent(numbers, logits_BV.device, torch.float64)[..., None]
    temperature_B1, top_k_B1, top_p_B1, min_p_B1, quantile_B1 = columns
    sorted_BV, order_BV = (logits_BV.double() / temperature_B1).softmax(-1).sort(descending=True, stable=True)
    kept = min_p(top_p(top_k(sorted_BV, top_k_B1), top_p_B1), min_p_B1)
    cumulative = kept.cumsum(-1)
    place = torch.searchsorted(cumulative, quantile_B1 * cumulative[:, -1:], right=True)
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1).clamp_min(0)  # NaN keeps nothing
    logprobs_B1 = (kept.gather(-1, place) / cumulative[:, -1:]).log()
    return Drawn(order_BV.gather(-1, place).squeeze(-1), logprobs_B1.squeeze(-1))


def sample(logits_BV: Tensor, sampling: Sequence[Sampling], quantiles: Sequence[float]) -> Tensor:
    """(B,) tokens, as `draw`."""
    return draw(logits_BV, sampling, quantiles).tokens_B
