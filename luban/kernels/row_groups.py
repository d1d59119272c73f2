"""Which rows of a forward use which slot of stacked factors, at fixed addresses, so that a CUDA graph can read them.

N rows, S slots, W tiles of M rows of one slot each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEWEST_ROWS, MANY_ROWS = 16, 64  # of a tile: the fewest that tensor cores take; where prompts are read
MANY = 512  # rows of a forward from which on tiles have many
NONE = -1
Spans = Sequence[tuple[int | None, int]]  # (slot or none, rows) in the order of the row


@dataclass(frozen=True)
class RowGroups:
    """The rows of a forward that use a slot; other rows are in no tile.

    Args:
        slots: (W,) int32; −1: the tile has no rows.
        rows: (W, M) int32, −1 behind a tile's last one. With the same M in every forward, 16 or 64, what a row gets doesn't depend
            on the others.
        segments: slots and their rows (N',) on the host, for where there are no kernels.
    """

    slots: Tensor
    rows: Tensor
    segments: tuple[tuple[int, Tensor], ...]


class RowGroupBuffers:
    """Memory of `RowGroups` for any forward.

    Args:
        slots: S. tokens: rows of a forward at most.
        fixed: tiles have 16 rows in every forward.
    """

    def __init__(self, slots: int, tokens: int, device: torch.device, *, fixed: bool = False):
        self.slots, self.fixed = slots, fixed
        self.tiles = most_tiles(tokens, slots, FEWEST_ROWS)  # at most; slots stand before rows
        length = self.tiles + max(rows * most_tiles(tokens, slots, rows) for rows in (FEWEST_ROWS, MANY_ROWS))
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=on_gpu)
        self._device = torch.zeros(length, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._written: tuple[object, ...] = ()
        self._found: RowGroups | None = None

    def write(self, spans: Spans, size: int | None = None) -> RowGroups | None:
        """Groups of the rows; the next call overwrites them. None: no row has a slot.

        Args:
            size: rows of the recorded forward that reads them: groups of one size always lie in the same places. None: as
                many as there are.
        """
        if self._written != (what := (tuple(spans), size)):  # else as in the last step, which is common in decoding
            self._found, self._written = self._write(spans, size), what
        return self._found

    def _write(self, spans: Spans, size: int | None) -> RowGroups | None:
        segments = rows_by_slot(spans)
        if not segments:
            return None
        each = tile_rows(size or sum(count for _, count in spans), fixed=self.fixed)
        tiles = [(slot, rows[at : at + each]) for slot, rows in segments.items() for at in range(0, len(rows), each)]
        count = len(tiles) if size is None else most_tiles(size, self.slots, each)
        end = self.tiles + count * each
        if self._copied is not None:
            self._copied.synchronize()  # the last copy reads the buffer that is filled now
        numbers = self._host.numpy()
        numbers[:count], numbers[self.tiles : end] = NONE, NONE
        for index, (slot, rows) in enumerate(tiles):
            numbers[index] = slot
            numbers[self.tiles + index * each : self.tiles + index * each + len(rows)] = rows
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return RowGroups(
            slots=self._device[:count],
            rows=self._device[self.tiles : end].view(count, each),
            segments=tuple((slot, torch.from_numpy(rows)) for slot, rows in segments.items()),
        )


def tile_rows(rows: int, *, fixed: bool = False) -> int:
    """Rows of a tile in a forward over so many rows."""
    return MANY_ROWS if rows >= MANY and not fixed else FEWEST_ROWS


def most_tiles(rows: int, slots: int, each: int) -> int:
    """Tiles of a forward over so many rows, however these are divided among slots."""
    return rows // each + min(rows, slots)


def rows_by_slot(spans: Spans) -> dict[int, np.ndarray]:
    """The rows (N',) int64 of each slot that any uses."""
    held: dict[int, list[np.ndarray]] = {}
    start = 0
    for slot, count in spans:
        if slot is not None:
            held.setdefault(slot, []).append(np.arange(start, start + count))
        start += count
    return {slot: np.concatenate(held[slot]) for slot in sorted(held)}
