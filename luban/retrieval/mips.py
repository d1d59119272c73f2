"""Exact maximum inner product search: queries × vectors in blocks, on any device.

N vectors, Q queries, E their width, k results.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 14  # vectors multiplied at a time


def exact_search(
    vectors: Tensor, queries: Tensor, k: int, *, scales: Tensor | None = None, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and places of the k largest inner products, largest first, equal ones in the order of places.

    Args:
        vectors: (N, E) in any floating precision, or int8 with `scales`; on the queries' device.
        queries: (Q, E) float32.
        scales: (N,) float32.
        present: (N,) bool; the others are passed over. None: all.

    k is cut to the number of vectors; places of those passed over come last, with a score of -inf.
    """
    k = min(k, len(vectors))
    best = queries.new_empty((len(queries), 0))
    places = torch.empty((len(queries), 0), dtype=torch.int64, device=queries.device)
    for first in range(0, len(vectors), BLOCK):
        block = slice(first, first + BLOCK)
        rows = vectors[block]
        if scales is None:
            scores = (queries.to(rows.dtype) @ rows.T).float()
        else:
            scores = (queries @ rows.float().T) * scales[block]
        if present is not None:
            scores.masked_fill_(~present[block], -torch.inf)
        top, inside = scores.topk(min(k, scores.shape[1]), dim=1)
        best, chosen = torch.cat([best, top], 1).topk(min(k, best.shape[1] + top.shape[1]), dim=1)
        places = torch.cat([places, inside + first], 1).gather(1, chosen)
    return _ordered(best, places)


def _ordered(scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """By score, largest first, then by place."""
    by_place = places.argsort(dim=1)
    scores, places = scores.gather(1, by_place), places.gather(1, by_place)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), places.gather(1, order)
