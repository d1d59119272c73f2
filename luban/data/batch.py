"""Batches of packed rows for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

STARTS_MULTIPLE = 4  # a row's list of documents has a multiple of so many entries: kernels walk the empty ones too


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed documents; B rows, T tokens each. Every array has the rows first."""

    tokens: np.ndarray  # (B, T) int64, input ids
    targets: np.ndarray  # (B, T) int64, the id that follows each input
    loss_mask: np.ndarray  # (B, T) bool, false: padding, the first token of a document, untrained chat tokens
    documents: np.ndarray  # (B, T) int32, which document of its row a token is of, from 0; -1 is padding
    positions: np.ndarray  # (B, T) int32, from 0 in each document

    def arrays(self) -> dict[str, np.ndarray]:
        """The loss module's inputs by name."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(self)},
            "document_starts": self.document_starts(),
        }

    def document_starts(self) -> np.ndarray:
        """(B, C) int32: the slots at which documents begin, padding counted as one, then T.

        C is the multiple of 4 that holds those of every row, so that few shapes occur.
        """
        rows, slots = self.documents.shape
        fresh = np.ones((rows, slots), dtype=bool)
        np.not_equal(self.documents[:, 1:], self.documents[:, :-1], out=fresh[:, 1:])
        counts = np.count_nonzero(fresh, axis=1)
        entries = -(-int(counts.max(initial=1)) // STARTS_MULTIPLE) * STARTS_MULTIPLE
        starts = np.full((rows, entries), slots, dtype=np.int32)
        starts[np.arange(entries) < counts[:, None]] = np.flatnonzero(fresh) % slots
        return starts

    def cut(self, tensors: Mapping[str, Any], pieces: int) -> list[dict[str, Any]]:
        """The batch's tensors, and others with a row for each of its rows, cut into pieces of equally many rows."""
        size = len(self.tokens) // pieces
        return [{name: t[i * size : (i + 1) * size] for name, t in tensors.items()} for i in range(pieces)]

    @property
    def tokens_read(self) -> int:
        """Number of real tokens."""
        return int((self.documents >= 0).sum())

    @property
    def target_count(self) -> int:
        """Number of targets: what the summed loss of a step is divided by."""
        return int(self.loss_mask.sum())
