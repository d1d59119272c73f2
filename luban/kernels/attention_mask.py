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
# A list of at most 16 documents a row, or one document for every 64 slots, is always worth walking.
FEW_DOCUMENTS, SLOTS_A_DOCUMENT = 16, 64


@dataclass(frozen=True, kw_only=True)
class AttentionMask:
    """Which keys each query may attend to: the intersection of all these restrictions, except where said."""

    queries: int  # T
    keys: int  # S
    causal: bool  # a query doesn't attend to later slots
    device: torch.device
    window: int | None = None  # attend to itself and the window − 1 slots before it (if not causal, also after it)
    layout: BlockLayout | None = None  # block-sparse, for rows of S: the key blocks that each query block attends to
    token_mask: Tensor | None = None  # (B, S) bool, false where a key is padding
    documents: Tensor | None = None  # (B, T) int, T = S: each run of equal numbers is a document; attend within it only
    # (B, C) int: starts of those runs, padded with T; adds no information, but gives C without a device-to-host sync
    document_starts: Tensor | None = None
    # (B, T) bool, T = S: keys visible to every query of their document, earlier queries and those outside the window too
    prefix: Tensor | None = None

    @property
    def kind(self) -> Kind:
        """Form of the mask without its layout, found without a device-to-host sync: no mask, plain causal, causal within
        each document of a list, one interval of keys a query, or none of these."""
        if self.token_mask is self.documents is self.prefix is None and self.window is None:
            if not self.causal or self.queries == 1:
                return "all"
            return "causal"
        if self._listed:
            return "packed"
        # with a prefix and a window the visible keys are not one interval
        holes = self.prefix is not None and (self.window is not None or not self.causal)
        padded_cache = self.queries != self.keys and self.token_mask is not None
        return "irregular" if holes or padded_cache else "intervals"

    @property
    def _listed(self) -> bool:
        """True if causal documents, given with a list of their starts, are the only restriction."""
        listed = self.causal and self.document_starts is not None and self.documents is not None
        return listed and self.window is self.token_mask is self.prefix is None

    @property
    def too_many_documents(self) -> bool:
        """True if the list of documents is so long that walking it costs more than it saves."""
        entries = 0 if self.document_starts is None else self.document_starts.shape[1]
        return entries > FEW_DOCUMENTS and entries * SLOTS_A_DOCUMENT > self.keys

    def cu_seqlens(self) -> Tensor:
        """(B·C + 1,) int32: starts of the documents of a packed batch, its rows concatenated, then the end of the last;
        unused entries of the list are documents of no tokens."""
        assert self.document_starts is not None
        rows = self.document_starts.shape[0]
        offsets = torch.arange(0, rows * self.keys, self.keys, device=self.device, dtype=torch.int32)
        return F.pad((self.document_starts + offsets[:, None]).flatten(), (0, 1), value=rows * self.keys).int()

    def intervals(self) -> Intervals:
        """The mask as intervals, unless its kind is irregular. Padding must be at the ends of rows and a prefix at the
        start of its document: `valid` checks it."""
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
        """(1 or B, 1 or H, T, S) bool, true where visible. Every query, padding included, attends to its own slot, so that
        softmax gets at least one finite score."""
        first = self.keys - self.queries
        return self.between(
            torch.arange(first, self.keys, device=self.device), torch.arange(self.keys, device=self.device)
        )

    def between(self, query_slots: Tensor, key_slots: Tensor) -> Tensor:
        """The same for some of the slots, (T′,) and (S′,): (1 or B, 1 or H, T′, S′)."""
        query_column, key_row = query_slots[:, None], key_slots[None, :]
        visible = key_row <= query_column if self.causal else (key_row >= 0).expand(len(query_slots), -1)
        if self.window is not None:
            visible = visible & ((query_column - key_row).abs() < self.window)
        visible = visible[None, None]
        if self.prefix is not None:
            visible = visible | self.prefix[:, None, None, key_slots]
        if self.layout is not None:
            here = query_slots - (self.keys - self.queries)
            visible = visible & self._in_blocks(self.layout)[:, :, here[:, None], key_row]
        if self.documents is not None:
            runs = _runs(self.documents)
            visible = visible & (runs[:, None, query_slots, None] == runs[:, None, None, key_slots])
        if self.token_mask is not None:
            visible = (visible & self.token_mask[:, None, None, key_slots]) | (key_row == query_column)
        return visible

    def _in_blocks(self, layout: BlockLayout) -> Tensor:
        """(1 or B, 1 or H, T, S) bool, true where the layout allows it. Blocks are counted in real tokens, so that left
        padding doesn't shift them."""
        token_index_BS = torch.arange(self.keys, device=self.device)[None]
        if self.token_mask is not None:
            token_index_BS = (self.token_mask.long().cumsum(1) - 1).clamp(min=0)
        return in_blocks(layout.table, layout.block, token_index_BS, self.queries)

    def valid(self) -> Tensor | None:
        """(B,) bool, true if intervals can express the row's padding and prefix, and no padding precedes a layout's blocks;
        None without padding and prefix."""
        checks = []
        if self.token_mask is not None and self.layout is not None:
            checks.append(self.token_mask[:, 0])
        if self.token_mask is not None:  # the real slots are one run
            checks.append((self.token_mask[:, 1:] & ~self.token_mask[:, :-1]).sum(-1) + self.token_mask[:, 0] <= 1)
        if (prefix := self._real_prefix) is not None:
            opens = prefix[:, 1:] & ~prefix[:, :-1]  # allowed only at the start of a document (or of its real tokens)
            if self.documents is not None:
                opens = opens & (self.documents[:, 1:] == self.documents[:, :-1])
            if self.token_mask is not None:
                opens = opens & self.token_mask[:, :-1]
            checks.append(~opens.any(-1))
        return None if not checks else torch.stack(checks).all(0)


def _runs(documents: Tensor) -> Tensor:
    """Index (B, T) of each slot's run of equal numbers in `documents` (B, T), from 0."""
    starts = torch.zeros_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return starts.cumsum(1)


def are_consecutive(positions: Tensor, documents: Tensor | None, token_mask: Tensor | None) -> Tensor:
    """() bool, true if positions (B, T) rise by one per slot in every document, so that distances between positions equal
    those between slots. `documents` (B, T) below 0 are padding; `token_mask` (B, T) is false where padding."""
    rises = positions[:, 1:] - positions[:, :-1] == 1
    if documents is not None:
        rises = rises | (documents[:, 1:] != documents[:, :-1]) | (documents[:, 1:] < 0)
    if token_mask is not None:
        rises = rises | ~(token_mask[:, 1:] & token_mask[:, :-1])
    return rises.all()
