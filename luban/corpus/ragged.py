"""Rows of different length in one array: what steps remember of many documents, in a file or in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Row i is `values[offsets[i] : offsets[i + 1]]`."""

    values: np.ndarray  # (sum of lengths,)
    offsets: np.ndarray  # (rows + 1,) int64, the first 0

    @classmethod
    def of(cls, rows: Sequence[np.ndarray], dtype: type) -> Ragged:
        """The rows, in order."""
        offsets = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        return cls(np.concatenate(rows).astype(dtype, copy=False) if len(rows) else np.zeros(0, dtype), offsets)

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) int64."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        for start, stop in zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True):
            yield self.values[start:stop]

    def save(self, path: Path) -> None:
        """Write `PATH.values.npy` and `PATH.offsets.npy`."""
        np.save(f"{path}.values.npy", self.values)
        np.save(f"{path}.offsets.npy", self.offsets)

    @classmethod
    def load(cls, path: Path) -> Ragged:
        """Memory-map a file written by `save`."""
        return cls(np.load(f"{path}.values.npy", mmap_mode="r"), np.load(f"{path}.offsets.npy"))
