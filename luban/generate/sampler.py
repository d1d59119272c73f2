"""From logits to tokens, all rows at once and on the device; B rows, V vocabulary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from luban.core.seeding import derive
from luban.generate.sampling import Sampling

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


def penalise(logits_BV: Tensor, seen: Sequence[Sequence[int]], penalties: Sequence[float]) -> Tensor:
    """Logits of the tokens that each row has seen divided by its penalty (Keskar et al. 2019, section 4.1), or multiplied
    by it where they are negative, as transformers does, so that a penalty above 1 always makes them less likely."""
    places = [
        (row, token)
        for row, (tokens, penalty) in enumerate(zip(seen, penalties, strict=True))
        if penalty != 1
        for token in set(tokens)
    ]
    if not places:
        return logits_BV
    rows, ids = torch.tensor(places, device=logits_BV.device).unbind(1)
    factor = torch.tensor(penalties, dtype=logits_BV.dtype, device=logits_BV.device)[rows]
    old = logits_BV[rows, ids]
    return logits_BV.index_put((rows, ids), torch.where(old > 0, old / factor, old * factor))


def subtract(
    logits_BV: Tensor, generated: Sequence[Sequence[int]], presence: Sequence[float], frequency: Sequence[float]
) -> Tensor:
    """Logits of the tokens that each row has generated less its presence penalty and its frequency penalty times how often
    (OpenAI's API, "frequency and presence penalties")."""
    places, amounts = [], []
    for row, (tokens, once, each) in enumerate(zip(generated, presence, frequency, strict=True)):
        if once or each:
            counts = Counter(tokens)
            places += [(row, token) for token in counts]
            amounts += [once + each * count for count in counts.values()]
    if not places:
        return logits_BV
    rows, ids = torch.tensor(places, device=logits_BV.device).unbind(1)
    amount = torch.tensor(amounts, dtype=logits_BV.dtype, device=logits_BV.device)
    return logits_BV.index_put((rows, ids), logits_BV[rows, ids] - amount)


def uniform(seed: int, choice: int, step: int) -> float:
    """A number in [0, 1) that depends on the request's seed, the continuation and the step, and on nothing else."""
    return derive(seed, "sample", choice, step) / DRAW_RANGE


def sample(logits_BV: Tensor, sampling: Sequence[Sampling], draws: Sequence[float]) -> Tensor:
    """(B,) tokens at the quantiles `draws` of each row's tempered and filtered distribution, likeliest tokens first.

    Filters apply in the order temperature, top-k, top-p, min-p, each to what the one before left. A row with
    temperature 0 is greedy. A row doesn't depend on the others; of one with NaN any token may come.
    """
    if all(s.temperature == 0 for s in sampling):
        return logits_BV.argmax(-1)

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits_BV.device)[:, None]

    temperature = column([s.temperature or 1.0 for s in sampling])
    sorted_BV, order_BV = (logits_BV.double() / temperature).softmax(-1).sort(descending=True, stable=True)
    kept = top_k(sorted_BV, column([1 if s.temperature == 0 else s.top_k for s in sampling]))
    kept = min_p(top_p(kept, column([s.top_p for s in sampling])), column([s.min_p for s in sampling]))
    cumulative = kept.cumsum(-1)
    place = torch.searchsorted(cumulative, column(draws) * cumulative[:, -1:], right=True)
    place = torch.minimum(place, (kept > 0).sum(-1, keepdim=True) - 1).clamp_min(0)  # NaN keeps nothing
    return order_BV.gather(-1, place).squeeze(-1)
