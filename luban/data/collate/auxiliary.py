"""Batches with two sets of targets: those of a task, and every token but padding for a language model beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.data.batch import Batch
from luban.data.collate.rows import ChangedRows
from luban.data.packing import PACKINGS
from luban.data.shards import Shards


@dataclass(frozen=True, kw_only=True)
class WeightedBatch(Batch):
    """The task's targets are those of `loss_mask`, and its count divides everything."""

    others: np.ndarray  # (B, T) bool: targets of the auxiliary loss
    weights: np.ndarray  # (B,) float32: of the auxiliary loss's sum, the same in all rows


def add_language_targets(batch: Batch, weight: float) -> WeightedBatch:
    """The batch with the language model's targets, and the factor that makes their sum `weight` times a mean."""
    follows = batch.documents[:, 1:] == batch.documents[:, :-1]  # the next token is of the same document
    others = (batch.documents >= 0) & (np.pad(follows, ((0, 0), (0, 1))) | batch.loss_mask)
    scale = weight * batch.target_count / max(int(others.sum()), 1)
    return WeightedBatch(**vars(batch), others=others, weights=np.full(len(others), scale, dtype=np.float32))


def auxiliary_rows(shards: Shards, *, seq_len: int, packing: str, weight: float) -> ChangedRows:
    """Packed rows with both sets of targets."""
    return ChangedRows(
        PACKINGS[packing](shards, seq_len), lambda batch, rows, epochs: add_language_targets(batch, weight)
    )
