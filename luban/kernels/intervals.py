"""Masks as intervals: query i sees keys start[i] ≤ j < stop[i].

Causal, sliding-window, document-packed, prefix and padded masks are all of this form, with start and stop
that never decrease from one query to the next; so one kernel serves them all, and a block of queries knows
from four numbers which blocks of keys it must touch and which of those need no mask.

B batch, T queries, S keys. Queries are the last T of the S places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Intervals:
    """Interval of visible keys of each query. `plain` marks the plain causal mask, which kernels compute themselves."""

    start: Tensor  # (B or 1, T) int32, first key seen
    stop: Tensor  # (B or 1, T) int32, one past the last key seen
    plain: bool = False
    backward_only: bool = False  # no query sees a later key
    seeing: Tensor | None = None  # what `seeing_rows` says, for a backward pass over keys
    items: Tensor | None = None  # what `work_items` says: in which order kernels take the blocks

    def dense(self, keys: int) -> Tensor:
        """(B or 1, 1, T, S) bool, true where seen: for references and tests."""
        places = torch.arange(keys, device=self.start.device)
        return ((places >= self.start[..., None]) & (places < self.stop[..., None]))[:, None]

    def pairs(self) -> int:
        """Query–key pairs seen, summed over the batch rows given."""
        return int((self.stop - self.start).clamp(min=0).sum())


def intervals(
    queries: int,
    keys: int,
    *,
    causal: bool = True,
    window: int | None = None,
    documents: Tensor | None = None,
    prefix: Tensor | None = None,
    token_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Intervals:
    """The intervals of a mask.

    Args:
        queries, keys: T and S, T ≤ S.
        causal: a query sees no later key.
        window: a query sees itself and the `window - 1` keys before it (and after it, where not causal).
        documents: (B, S) int, a run of one number is a document; a query sees only its own. Needs T = S.
        prefix: (B, S) bool, keys at the beginning of their document that all its queries see. Needs T = S.
        token_mask: (B, S) bool, false where a key is padding, which nobody sees; real keys are contiguous.
    """
    at = torch.arange(keys - queries, keys, device=device, dtype=torch.int32)[None]
    start = torch.zeros_like(at)
    stop = at + 1 if causal else torch.full_like(at, keys)
    plain = causal and all(x is None for x in (window, documents, prefix, token_mask))
    if window is not None:
        start = (at - window + 1).clamp(min=0)
        stop = stop if causal else (at + window).clamp(max=keys)
    first, last = (start * 0, stop * 0 + keys) if documents is None else _document_bounds(documents)
    if prefix is not None:
        stop = torch.maximum(stop, _prefix_end(prefix, last))
    start, stop = torch.maximum(start, first), torch.minimum(stop, last)
    if token_mask is not None:
        places = torch.arange(keys, device=device, dtype=torch.int32)[None]
        start = torch.maximum(start, torch.where(token_mask, places, keys).amin(1, keepdim=True))
        stop = torch.minimum(stop, torch.where(token_mask, places + 1, 0).amax(1, keepdim=True))
    start, stop = torch.broadcast_tensors(start, stop)
    return Intervals(
        start.to(torch.int32).contiguous(), stop.to(torch.int32).contiguous(), plain, causal and prefix is None
    )


def _prefix_end(prefix: Tensor, last: Tensor) -> Tensor:
    """(B, S) one past the prefix of each place's document, which ends at `last`: the last prefix place before there."""
    places = torch.arange(prefix.shape[1], device=prefix.device, dtype=torch.int32)[None]
    ends = torch.where(prefix, places + 1, 0).cummax(1).values
    return ends.gather(1, (last.expand(prefix.shape) - 1).long()).to(torch.int32)


def _document_bounds(documents: Tensor) -> tuple[Tensor, Tensor]:
    """First place and one past the last place of each place's document, (B, S) int32 both."""
    size = documents.shape[1]
    places = torch.arange(size, device=documents.device, dtype=torch.int32)[None]
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    first = torch.where(opens, places, 0).cummax(1).values
    closes = torch.ones_like(opens)
    closes[:, :-1] = opens[:, 1:]
    last = torch.where(closes, places + 1, size).flip(1).cummin(1).values.flip(1)
    return first.to(torch.int32), last.to(torch.int32)


def seeing_rows(mask: Intervals, keys: int) -> Tensor:
    """Which queries see each key, the mask turned round: they are an interval too, since start and stop never decrease.

    Returns:
        (B or 1, 2, S) int32: the first query that sees the key, and one past the last.
    """
    places = (
        torch.arange(keys, device=mask.start.device, dtype=torch.int32).expand(mask.start.shape[0], -1).contiguous()
    )
    first = torch.searchsorted(mask.stop, places, right=True)  # the first query with stop > place
    past = torch.searchsorted(mask.start, places, right=True)  # the first one with start > place
    return torch.stack([first, past], 1).to(torch.int32)


def work_items(mask: Intervals, seeing: Tensor, side: int) -> Tensor:
    """Blocks of `side` places in the order in which a kernel should take them, and what bounds each: those of long documents
    first, so that the last programs are short ones; those of one document together, those with most work first, so that
    its keys are read from near memory. Needs T = S.

    Args:
        seeing: (B or 1, 2, T) int32, what `seeing_rows` says.

    Returns:
        (2, blocks of all rows, 6) int32, for blocks of queries and for blocks of keys: row, block, and where what its first
        and its last place see (or are seen by) begins, and ends.
    """
    T = mask.start.shape[1]
    tops = torch.arange(0, T, side, device=mask.start.device)
    bottoms = (tops + side).clamp(max=T) - 1
    reach = (seeing[:, 1, tops] - mask.start[:, tops]).flatten()
    first = reach.argsort(descending=True, stable=True)  # a document's first keys are seen by most,
    last = len(reach) - 1 - reach.flip(0).argsort(descending=True, stable=True)  # and its last queries see most

    def bounds(order: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        each = [x[:, at].flatten()[order] for x in (begin, end) for at in (tops, bottoms)]
        return torch.stack([order // len(tops), order % len(tops), *each], 1)

    return torch.stack([bounds(last, mask.start, mask.stop), bounds(first, seeing[:, 0], seeing[:, 1])]).to(torch.int32)
