"""What a training step reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
        return self.tokens, self.targets, self.loss_mask, self.documents, self.positions

    @property
    def tokens_read(self) -> int:
        """Number of real tokens."""
        return int((self.documents >= 0).sum())

    @property
    def tokens_trained(self) -> int:
        """Number of targets that count in the loss."""
        return int(self.loss_mask.sum())
