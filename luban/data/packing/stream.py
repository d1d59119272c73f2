"""Stream packing: all documents end to end, cut into windows of T inputs; no padding but at the very end."""

from __future__ import annotations

import numpy as np

from luban.core.errors import DataError
from luban.data.batch import Batch
from luban.data.shards import Shards


class StreamPacking:
    """Row r reads tokens rT … rT+T, so every token but the first is a target exactly once an epoch.

    Raises:
        DataError: there are fewer tokens than one row needs.
    """

    def __init__(self, shards: Shards, seq_len: int):
        if shards.tokens < seq_len + 1:
            raise DataError(
                f"shards {shards.path} hold {shards.tokens} {shards.split} tokens, fewer than one sequence "
                f"of {seq_len} and its last target: lower train.seq_len or use more text"
            )
        self.shards, self.seq_len = shards, seq_len
        self.rows = -(-(shards.tokens - 1) // seq_len)

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these row numbers; a negative number is a row of padding."""
        shards, last = self.shards, self.shards.tokens - 1
        starts = np.asarray(rows, dtype=np.int64)[:, None] * self.seq_len
        wanted = starts + np.arange(self.seq_len + 1)  # (B, T+1)
        real = (wanted[:, 1:] <= last) & (starts >= 0)  # a row may run over the end
        index = np.clip(wanted, 0, last)
        found = shards.data[index].astype(np.int64)
        document = np.searchsorted(shards.offsets, index, side="right") - 1  # (B, T+1)
        begin = shards.offsets[document]
        loss_mask = real & (index[:, 1:] != begin[:, 1:])
        if shards.mask is not None:
            loss_mask &= shards.mask[index[:, 1:]] != 0
        positions = index[:, :-1] - np.maximum(begin[:, :-1], starts)
        return Batch(
            tokens=np.where(real, found[:, :-1], shards.pad_id),
            targets=np.where(real, found[:, 1:], shards.pad_id),
            loss_mask=loss_mask,
            documents=np.where(real, document[:, :-1] - document[:, :1], -1).astype(np.int32),
            positions=np.where(real, positions, 0).astype(np.int32),
        )
