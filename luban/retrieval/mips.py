"""Exact maximum inner product search: queries × vectors in blocks, on any device.

N vectors, Q queries, E their width, k results.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 14  # vectors multiplied at a time on a CPU, whose scores stay in its cache
LARGEST = 1 << 26  # on other devices so many scores, or 8-bit numbers made float: fewer, longer kernels
FEW, GROUP = 2, 1 << 10  # queries that a CPU multiplies by batches of so many vectors


def exact_search(
    vectors: Tensor, queries: Tensor, k: int, *, scales: Tensor | None = None, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(Q, k) scores and places of the k largest inner products on the host, largest first, equal ones in the order of places.

    Args:
        vectors: (N, E) in any floating precision, or int8 with `scales`; on the queries' device.
        queries: (Q, E) float32.
        scales: (N,) float32.
        present: (N,) bool; the others are passed over. None: all.

    k is cut to the number of vectors; places of those passed over come last, with a score of -inf.
    """
    k = min(k, len(vectors))
    best, places = queries.new_empty((len(queries), 0)), queries.new_empty((len(queries), 0), dtype=torch.int64)
    size = BLOCK
    if queries.device.type != "cpu":
        size = max(BLOCK, LARGEST // max(len(queries), 1 if scales is None else vectors.shape[1], 1))
    for first in range(0, len(vectors), size):
        block = slice(first, first + size)
        rows = vectors[block]
        if scales is None:
            scores = _products(rows, queries.to(rows.dtype)).float()
        else:
            scores = _products(rows.float(), queries) * scales[block]
        if present is not None:
            scores.masked_fill_(~present[block], -torch.inf)
        top, inside = scores.topk(min(k, scores.shape[1]), dim=1)
        if not first:  # mostly the only block on a GPU, where each launch takes as long as some megabytes
            best, places = top, inside
            continue
        best, chosen = torch.cat([best, top], 1).topk(min(k, best.shape[1] + top.shape[1]), dim=1)
        places = torch.cat([places, inside + first], 1).gather(1, chosen)
    return _ordered(best.cpu(), places.cpu())


def _products(rows: Tensor, queries: Tensor) -> Tensor:
    """(Q, n) inner products of rows (n, E) and queries (Q, E).

    On a CPU the vectors are the left factor, and for one or two queries a batch of short matrices: MKL reads a matrix three times
    as slowly where it is a transposed right factor of few rows, and for a matrix times one vector.
    """
    whole = len(rows) - len(rows) % GROUP
    if queries.device.type != "cpu":
        return queries @ rows.T
    if len(queries) > FEW or not whole:
        return (rows @ queries.T).T.contiguous()
    batch = rows[:whole].view(-1, GROUP, rows.shape[1])
    first = torch.bmm(batch, queries.T.expand(len(batch), -1, -1)).view(whole, -1)
    return torch.cat([first, rows[whole:] @ queries.T]).T.contiguous()


def _ordered(scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """By score, largest first, then by place."""
    by_place = places.argsort(dim=1)
    scores, places = scores.gather(1, by_place), places.gather(1, by_place)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return scores.gather(1, order), places.gather(1, order)
