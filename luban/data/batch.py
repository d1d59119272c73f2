"""What a training step reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PLACES = 4  # for documents of a row, or a multiple: kernels walk the empty ones too


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows of packed documents; B rows, T tokens each."""

    tokens: np.ndarray  # (B, T) int64, input ids
    targets: np.ndarray  # (B, T) int64, the id that follows each input
    loss_mask: np.ndarray  # (B, T) bool, false: padding, the first token of a document, untrained chat tokens
    documents: np.ndarray  # (B, T) int32, which document of its row a token is of, from 0; -1 is padding
    positions: np.ndarray  # (B, T) int32, from 0 in each document

    def arrays(self) -> tuple[np.ndarray, ...]:
        """What a loss reads, rows first, in the order of its arguments."""
        return (*self.by_token(), self.starts())

    def by_token(self) -> tuple[np.ndarray, ...]:
        """The arrays that hold something of every token."""
        return self.tokens, self.targets, self.loss_mask, self.documents, self.positions

    def starts(self) -> np.ndarray:
        """(B, C) int32: the slots at which documents begin, padding counted as one, then T.

        C is the multiple of 4 that holds those of every row, so that few shapes occur.
        """
        rows, slots = self.documents.shape
        fresh = np.ones((rows, slots), dtype=bool)
        np.not_equal(self.documents[:, 1:], self.documents[:, :-1], out=fresh[:, 1:])
        counts = np.count_nonzero(fresh, axis=1)
        places = -(-int(counts.max(initial=1)) // PLACES) * PLACES
        starts = np.full((rows, places), slots, dtype=np.int32)
        starts[np.arange(places) < counts[:, None]] = np.flatnonzero(fresh) % slots
        return starts

    @property
    def tokens_read(self) -> int:
        """Number of real tokens."""
        return int((self.documents >= 0).sum())

    @property
    def tokens_trained(self) -> int:
        """Number of targets that count in the loss."""
        return int(self.loss_mask.sum())
