"""Which rows of a forward use which slot of stacked factors, at fixed addresses, so that a CUDA graph can read them.

N rows, S slots, W tiles of rows of one slot each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

FEWEST_ROWS, MANY_ROWS = 16, 64  # of a tile: the fewest that tensor cores take; where prompts are read
MANY = 512  # rows of a forward from which on tiles have many
TILE_FIELDS = 3


@dataclass(frozen=True)
class Segment:
    """Rows of one slot: `order[start:stop]`."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class RowGroups:
    """The rows of a forward that use a slot; other rows are in no tile.

    Args:
        order: (N,) int32 rows, those of a slot one after another.
        tiles: (W, 3) int32 slot, first place in `order`, rows; a tile without rows is no work.
        rows: of a tile at most, 16 or 64. With the same number in every forward, what a row gets doesn't depend on the others.
        segments: the same on the host, for where there are no kernels.
    """

    order: Tensor
    tiles: Tensor
    rows: int
    segments: tuple[Segment, ...]


class RowGroupBuffers:
    """Memory of `RowGroups` for any forward.

    Args:
        slots: S. tokens: rows of a forward at most.
        fixed: tiles have 16 rows in every forward.
    """

    def __init__(self, slots: int, tokens: int, device: torch.device, *, fixed: bool = False):
        self.slots, self.tokens, self.fixed = slots, tokens, fixed
        length = tokens + TILE_FIELDS * (tokens // FEWEST_ROWS + min(slots, tokens))
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(length, dtype=torch.int32, pin_memory=on_gpu)
        self._device = torch.zeros(length, dtype=torch.int32, device=device)
        self._copied = torch.cuda.Event() if on_gpu else None
        self._written: tuple[object, ...] = ()
        self._found: RowGroups | None = None

    def write(self, spans: Sequence[tuple[int | None, int]], size: int | None = None) -> RowGroups | None:
        """Groups of (slot or None, rows) in the order of the row; the next call overwrites them. None: no row has a slot.

        Args:
            size: rows of the recorded forward that reads them: groups of one size always lie in the same places. None: as
                many as there are.
        """
        if self._written != (what := (tuple(spans), size)):  # else as in the last step, which is common in decoding
            self._found, self._written = self._write(spans, size), what
        return self._found

    def _write(self, spans: Sequence[tuple[int | None, int]], size: int | None) -> RowGroups | None:
        order, segments = _sorted(spans)
        if not segments:
            return None
        rows = tile_rows(size or sum(count for _, count in spans), fixed=self.fixed)
        tiles = [(s.slot, at, min(rows, s.stop - at)) for s in segments for at in range(s.start, s.stop, rows)]
        count = len(tiles) if size is None else size // rows + min(self.slots, size)
        first, end = self.tokens, self.tokens + TILE_FIELDS * count
        if self._copied is not None:
            self._copied.synchronize()  # the last copy reads the buffer that is filled now
        numbers = self._host.numpy()
        numbers[: len(order)] = order
        numbers[first:end] = 0
        numbers[first : first + TILE_FIELDS * len(tiles)] = np.asarray(tiles, dtype=np.int32).ravel()
        for part in (slice(0, len(order)), slice(first, end)):
            self._device[part].copy_(self._host[part], non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        found = self._device[first:end].view(count, TILE_FIELDS)
        return RowGroups(self._device[: len(order) if size is None else size], found, rows, segments)


def tile_rows(rows: int, *, fixed: bool = False) -> int:
    """Rows of a tile in a forward over so many rows."""
    return MANY_ROWS if rows >= MANY and not fixed else FEWEST_ROWS


def _sorted(spans: Sequence[tuple[int | None, int]]) -> tuple[np.ndarray, tuple[Segment, ...]]:
    """Rows with a slot in the order of the slots, and the slots' segments of them."""
    held: dict[int, list[np.ndarray]] = {}
    start = 0
    for slot, count in spans:
        if slot is not None:
            held.setdefault(slot, []).append(np.arange(start, start + count, dtype=np.int32))
        start += count
    segments, place = [], 0
    for slot in sorted(held):
        count = sum(map(len, held[slot]))
        segments.append(Segment(slot, place, place + count))
        place += count
    parts = [part for slot in sorted(held) for part in held[slot]]
    return (np.concatenate(parts) if parts else np.empty(0, np.int32)), tuple(segments)
