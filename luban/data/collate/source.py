"""Batches for encoder–decoders, and those of denoising: an encoder reads a corrupted text, a decoder writes the whole
(BART, Lewis et al. 2020)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from luban.data.batch import Batch
from luban.data.collate.noise import Noise
from luban.data.collate.rows import DocumentPieces, pad_rows
from luban.data.collate.special_tokens import MASK, SpecialTokens
from luban.data.shards import Shards


@dataclass(frozen=True, kw_only=True)
class SourceBatch(Batch):
    """`tokens`, `targets` and `loss_mask` are the decoder's, beside the source's."""

    source: np.ndarray  # (B, S) int64, what the encoder reads
    source_mask: np.ndarray  # (B, S) bool, false: padding

    def arrays(self) -> dict[str, np.ndarray]:
        """The loss module's inputs by name."""
        names = ("source", "source_mask", "tokens", "targets", "loss_mask")
        return {name: getattr(self, name) for name in names}

    @property
    def tokens_read(self) -> int:
        """Real tokens on both sides."""
        return int(self.source_mask.sum()) + int(self.loss_mask.sum())


def source_batch(
    sources: list[list[int]], targets: list[list[int]], *, start: int, pad: int, source_len: int, target_len: int
) -> SourceBatch:
    """Rows padded on the right; the decoder reads `start` and then its own targets, one later."""
    read = [[start, *row[:-1]] if row else [] for row in targets]
    trained = pad_rows([[True] * len(row) for row in targets], target_len, False, bool)
    positions = np.broadcast_to(np.arange(target_len, dtype=np.int32), trained.shape)
    return SourceBatch(
        tokens=pad_rows(read, target_len, pad),
        targets=pad_rows(targets, target_len, pad),
        loss_mask=trained,
        documents=np.where(trained, 0, -1).astype(np.int32),
        positions=positions,
        source=pad_rows(sources, source_len, pad),
        source_mask=pad_rows([[True] * len(s) for s in sources], source_len, False, bool),
    )


class CorruptedRows(DocumentPieces):
    """Begin, text, end on both sides; the encoder's is corrupted. Inserted masks that no longer fit are cut off.

    Args:
        start: id that the decoder begins with.
    """

    def __init__(self, shards: Shards, seq_len: int, seed: int, *, noise: Noise, start: int):
        super().__init__(shards, longest=seq_len - 2, shortest=2, seed=seed)
        self.noise, self.start, self.seq_len, self.special = noise, start, seq_len, SpecialTokens.of(shards)
        self.special.need(MASK, "mask")
        self.begin = [] if self.special.begin is None else [self.special.begin]

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch."""
        sources: list[list[int]] = []
        targets: list[list[int]] = []
        for row, epoch in places:
            if row < 0:
                sources.append([])
                targets.append([])
                continue
            text = self.piece(row)
            corrupted = self.noise(self.draw("noise", row, epoch), text, self.special)[: self.seq_len - 2]
            sources.append([*self.begin, *corrupted.tolist(), self.special.end])
            targets.append([*self.begin, *text.tolist(), self.special.end])
        return source_batch(
            sources, targets, start=self.start, pad=self.special.pad, source_len=self.seq_len, target_len=self.seq_len
        )
