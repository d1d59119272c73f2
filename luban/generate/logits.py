"""What a request's settings change in the logits before a token is drawn, all rows at once and on the device.

B rows, V vocabulary. Each function returns its argument itself where no row asks for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor


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


def add_biases(logits_BV: Tensor, biases: Sequence[Sequence[tuple[int, float]]]) -> Tensor:
    """Logits plus each row's (token, bias) pairs; tokens outside of the vocabulary are ignored."""
    vocab_size = logits_BV.shape[-1]
    found = [(row, token, bias) for row, pairs in enumerate(biases) for token, bias in pairs if token < vocab_size]
    if not found:
        return logits_BV
    rows, tokens, amounts = zip(*found, strict=True)
    rows, ids = torch.tensor([rows, tokens], device=logits_BV.device)
    amount = torch.tensor(amounts, dtype=logits_BV.dtype, device=logits_BV.device)
    return logits_BV.index_put((rows, ids), amount, accumulate=True)


def forbid(logits_BV: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Logits with −∞ for each row's `tokens`, of which all are in the vocabulary."""
    places = [(row, token) for row, forbidden in enumerate(tokens) for token in forbidden]
    if not places:
        return logits_BV
    rows, ids = torch.tensor(places, device=logits_BV.device).unbind(1)
    return logits_BV.index_put((rows, ids), torch.tensor(float("-inf"), device=logits_BV.device))
