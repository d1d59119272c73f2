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

    @property
    def tokens_trained(self) -> int:
        """Number of targets that count in the loss."""
        return int(self.loss_mask.sum())
