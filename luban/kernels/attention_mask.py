"""The attention mask of a batch as data: nothing here is as large as T × S until `dense` is called.

B batch, T queries, S keys, C entries of a row's list of documents. Slots are indices in the row, padding included; the
queries are the last T of the S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.kernels.intervals import Intervals, intervals
from luban.kernels.layout import BlockLayout, in_blocks

Kind = Literal["all", "causal", "packed", "intervals", "irregular"]
FEW_DOCUMENTS, SLOTS_A_DOCUMENT = 16, 64  # up to so many list entries always pay, or one for so many slots


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """What restricts the keys that a query attends to; all of it holds at once."""

    queries: int  # T
    keys: int  # S
    causal: bool  # a query sees no later slot
    device: torch.device
    window: int | None = None  # a query sees itself and the window − 1 slots before it (and after it, where not causal)
    layout: BlockLayout | None = None  # for rows of S: a block of queries sees some blocks of keys alone
    token_mask: Tensor | None = None  # (B, S) bool, false where a key is padding
    documents: Tensor | None = None  # (B, T) int, T = S: a run of one number is a document, seen only from inside
    document_starts: Tensor | None = (
        None  # (B, C) int: where those runs begin, filled up with T; says nothing new, but C
    )
    prefix: Tensor | None = None  # (B, T) bool, T = S: keys that all queries of their document see, later ones too

    @property
    def kind(self) -> Kind:
        """Known without asking the device, of the rest beside a layout: everything, the bare triangle, a triangle for each
        document of a list, intervals of keys, or neither of these."""
        if self.token_mask is self.documents is self.prefix is None and self.window is None:
            if not self.causal or self.queries == 1:
                return "all"
            return "causal"
        if self._listed:
            return "packed"
        holes = self.prefix is not None and (self.window is not None or not self.causal)  # a prefix apart from the rest
        grown = self.queries != self.keys and self.token_mask is not None  # a few queries over a padded cache
        return "irregular" if holes or grown else "intervals"

    @property
    def _listed(self) -> bool:
        """Whether documents are all there is, and in a list."""
        listed = self.causal and self.document_starts is not None and self.documents is not None
        return listed and self.window is self.token_mask is self.prefix is None

    @property
    def too_many_documents(self) -> bool:
        """Whether the list has so many places that walking them costs more than it saves."""
        places = 0 if self.document_starts is None else self.document_starts.shape[1]
        return places > FEW_DOCUMENTS and places * SLOTS_A_DOCUMENT > self.keys

    def cu_seqlens(self) -> Tensor:
        """(B·C + 1,) int32: where the documents of a packed batch begin, its rows one after another, and the end of
        the last; places without one are documents of no tokens."""
        assert self.document_starts is not None
        rows = self.document_starts.shape[0]
        offsets = torch.arange(0, rows * self.keys, self.keys, device=self.device, dtype=torch.int32)
        return F.pad((self.document_starts + offsets[:, None]).flatten(), (0, 1), value=rows * self.keys).int()

    def intervals(self) -> Intervals:
        """The same as intervals, unless irregular. Padding must stand at the ends of rows and a prefix at the
        beginning of its document: `valid` says whether they do."""
        return intervals(
            self.queries,
            self.keys,
            causal=self.causal,
            window=self.window,
            documents=self.documents,
            prefix=self._real_prefix,
            token_mask=self.token_mask,
            device=self.device,
        )

    @property
    def _real_prefix(self) -> Tensor | None:
        return self.prefix if self.prefix is None or self.token_mask is None else self.prefix & self.token_mask

    def dense(self) -> Tensor:
        """(1 or B, 1 or H, T, S) bool. Every query sees its own slot, padding too, so that no row of scores is empty."""
        query_slots = torch.arange(self.keys - self.queries, self.keys, device=self.device)[:, None]
        key_slots = torch.arange(self.keys, device=self.device)[None, :]
        seen = key_slots <= query_slots if self.causal else (key_slots >= 0).expand(self.queries, -1)
        if self.window is not None:
            seen = seen & ((query_slots - key_slots).abs() < self.window)
        seen = seen[None, None]
        if self.prefix is not None:
            seen = seen | self.prefix[:, None, None, :]
        if self.layout is not None:
            seen = seen & self._in_blocks(self.layout)
        if self.documents is not None:
            runs = _runs(self.documents)
            seen = seen & (runs[:, None, :, None] == runs[:, None, None, :])
        if self.token_mask is not None:
            seen = (seen & self.token_mask[:, None, None, :]) | (key_slots == query_slots)
        return seen

    def _in_blocks(self, layout: BlockLayout) -> Tensor:
        """(1 or B, 1 or H, T, S) bool, what the layout leaves. Blocks are counted in real tokens, so that padding before
        them moves none."""
        places_BS = torch.arange(self.keys, device=self.device)[None]
        if self.token_mask is not None:
            places_BS = (self.token_mask.long().cumsum(1) - 1).clamp(min=0)
        return in_blocks(layout.table, layout.block, places_BS, self.queries)

    def valid(self) -> Tensor | None:
        """(B,) bool, whether padding and prefixes stand where intervals can say so, and before nothing that a layout counts;
        None where there are neither."""
        checks = []
        if self.token_mask is not None and self.layout is not None:
            checks.append(self.token_mask[:, 0])
        if self.token_mask is not None:  # at most one beginning of real slots, at most one end
            checks.append((self.token_mask[:, 1:] & ~self.token_mask[:, :-1]).sum(-1) + self.token_mask[:, 0] <= 1)
        if (prefix := self._real_prefix) is not None:
            opens = prefix[:, 1:] & ~prefix[:, :-1]  # only where a document (or its real part) begins
            if self.documents is not None:
                opens = opens & (self.documents[:, 1:] == self.documents[:, :-1])
            if self.token_mask is not None:
                opens = opens & self.token_mask[:, :-1]
            checks.append(~opens.any(-1))
        return None if not checks else torch.stack(checks).all(0)


def _runs(documents: Tensor) -> Tensor:
    """(B, T) numbers that rise by one where a new run begins."""
    fresh = torch.zeros_like(documents, dtype=torch.bool)
    fresh[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return fresh.cumsum(1)


def consecutive(positions: Tensor, documents: Tensor | None, token_mask: Tensor | None) -> Tensor:
    """() bool, whether positions (B, T) rise by one from slot to slot of every document, so that distances between
    positions are those between slots. Documents below 0 are padding."""
    fine = positions[:, 1:] - positions[:, :-1] == 1
    if documents is not None:
        fine = fine | (documents[:, 1:] != documents[:, :-1]) | (documents[:, 1:] < 0)
    if token_mask is not None:
        fine = fine | ~(token_mask[:, 1:] & token_mask[:, :-1])
    return fine.all()
