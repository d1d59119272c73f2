"""From one token's logits to the token: pure functions, V the vocabulary."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from luban.core.seeding import derive
from luban.generate.sampling import Sampling

DRAW_RANGE = 2.0**63


def top_k(probabilities_V: Tensor, k: int) -> Tensor:
    """Sorted probabilities with all but the `k` largest set to 0; 0 keeps all."""
    if not 0 < k < probabilities_V.numel():
        return probabilities_V
    return torch.where(torch.arange(probabilities_V.numel(), device=probabilities_V.device) < k, probabilities_V, 0)


def top_p(probabilities_V: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al. 2020): the shortest head of sorted probabilities whose sum reaches `p` of the whole."""
    if p >= 1:
        return probabilities_V
    before = probabilities_V.cumsum(0) - probabilities_V
    return torch.where(before < p * probabilities_V.sum(), probabilities_V, 0)


def min_p(probabilities_V: Tensor, p: float) -> Tensor:
    """Sorted probabilities below `p` times the first set to 0 (Nguyen et al. 2024)."""
    return torch.where(probabilities_V >= p * probabilities_V[0], probabilities_V, 0) if p > 0 else probabilities_V


def penalised(logits_V: Tensor, seen: Iterable[int], penalty: float) -> Tensor:
    """Logits of the tokens in `seen` divided by `penalty` (Keskar et al. 2019, section 4.1), or multiplied by it where
    they are negative, as transformers does, so that a penalty above 1 always makes them less likely."""
    ids = torch.tensor(sorted(set(seen)), device=logits_V.device)
    old = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(old > 0, old / penalty, old * penalty))


def uniform(seed: int, choice: int, step: int) -> float:
    """A number in [0, 1) that depends on the request's seed, the continuation and the step, and on nothing else."""
    return derive(seed, "sample", choice, step) / DRAW_RANGE


def sample(logits_V: Tensor, sampling: Sampling, u: float) -> int:
    """The token at quantile `u` of the tempered and filtered distribution, likeliest tokens first.

    Filters apply in the order temperature, top-k, top-p, min-p, each to what the one before left.
    """
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    tempered = (logits_V.double() / sampling.temperature).softmax(0)
    sorted_V, order_V = tempered.sort(descending=True, stable=True)
    kept = min_p(top_p(top_k(sorted_V, sampling.top_k), sampling.top_p), sampling.min_p)
    cumulative = kept.cumsum(0)
    place = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return int(order_V[min(place, int((kept > 0).sum()) - 1)])
