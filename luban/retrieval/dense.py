"""Vectors of a segment on disk, in float32 or in 8 bits.

N vectors, Q queries, E their width, k results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 127  # largest absolute value of an 8-bit number


def quantise(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, E) float32 → (N, E) int8 and (N,) float32 scales: vector ≈ scale · int8, off by half a scale at most."""
    scales = np.abs(vectors).max(1, initial=0.0).astype(np.float32) / LEVELS
    rows = np.rint(vectors / np.where(scales > 0, scales, 1)[:, None])
    return rows.astype(np.int8), scales


class Vectors:
    """The vectors of one segment.

    Args:
        rows: (N, E) float32, or int8 with `scales`.
        scales: (N,) float32.
    """

    def __init__(self, rows: np.ndarray, scales: np.ndarray | None = None):
        self.rows, self.scales = rows, scales
        self._on: dict[str, tuple[Tensor, Tensor | None]] = {}  # device → both of them there

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def save(folder: Path, vectors: np.ndarray, precision: str) -> None:
        """Write float32 vectors (N, E) in this precision: float32 or int8."""
        if precision == "int8":
            vectors, scales = quantise(vectors)
            np.save(folder / "scales.npy", scales)
        np.save(folder / "vectors.npy", vectors)

    @classmethod
    def open(cls, folder: Path) -> Vectors:
        """Map them into memory: only what is multiplied is read, and the system may drop it again."""
        scales = folder / "scales.npy"
        # copy-on-write, since torch warns of arrays that it can't write to; nothing writes
        rows = np.load(folder / "vectors.npy", mmap_mode="c")
        return cls(rows, np.load(scales) if scales.is_file() else None)

    def floats(self, places: slice | np.ndarray) -> np.ndarray:
        """(places, E) float32."""
        rows = self.rows[places]
        return rows if self.scales is None else rows.astype(np.float32) * self.scales[places, None]

    def search(
        self, queries: np.ndarray, k: int, present: np.ndarray | None = None, device: str = "cpu"
    ) -> tuple[np.ndarray, np.ndarray]:
        """(Q, k) scores and places, by `luban.retrieval.mips.exact_search` on a device, where the vectors stay."""
        import torch

        from luban.retrieval.mips import exact_search

        if device not in self._on:
            scales = None if self.scales is None else torch.from_numpy(self.scales).to(device)
            self._on[device] = torch.from_numpy(self.rows).to(device), scales
        rows, scales = self._on[device]
        kept = None if present is None else torch.from_numpy(present).to(device)
        found = exact_search(rows, torch.from_numpy(queries).to(device), k, scales=scales, present=kept)
        return found[0].cpu().numpy(), found[1].cpu().numpy()
