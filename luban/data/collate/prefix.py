"""Batches whose segments say which tokens every token of their document sees: prefix language modelling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.core.seeding import generator
from luban.data.batch import Batch
from luban.data.collate.rows import ChangedRows
from luban.data.packing import PACKINGS
from luban.data.shards import Shards


@dataclass(frozen=True, kw_only=True)
class SegmentBatch(Batch):
    """Tokens of segment 0 are seen by every token of their document."""

    segments: np.ndarray  # (B, T) int64


def prefix_rows(shards: Shards, *, seq_len: int, seed: int, packing: str) -> ChangedRows:
    """Packed rows in which every document is cut at a random place, anew every epoch: what is before the cut is seen both
    ways, what follows is predicted."""

    def change(batch: Batch, rows: np.ndarray, epochs: np.ndarray) -> Batch:
        segments = np.ones(batch.tokens.shape, dtype=np.int64)
        trained = batch.loss_mask.copy()
        for i, (row, epoch) in enumerate(zip(rows.tolist(), epochs.tolist(), strict=True)):
            rng = generator(seed, "prefix", row, epoch)
            for document in range(int(batch.documents[i].max()) + 1):
                places = np.flatnonzero(batch.documents[i] == document)
                if not len(places):
                    continue
                given = places[: int(rng.integers(1, len(places) + 1))]  # the last of them predicts what follows
                segments[i, given] = 0
                trained[i, given[:-1]] = False
        return SegmentBatch(**(vars(batch) | {"loss_mask": trained}), segments=segments)

    return ChangedRows(PACKINGS[packing](shards, seq_len), change)
