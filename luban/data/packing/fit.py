"""Best-fit packing: whole documents into rows of T, the rest of a row padded.

Best-fit decreasing over lengths (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", section 3).
A document longer than a row is divided into pieces that overlap by one token, so that no target is lost.
"""

from __future__ import annotations

import numpy as np

from luban.core.errors import DataError
from luban.core.log import warn
from luban.data.batch import Batch
from luban.data.shards import Shards


class FitPacking:
    """Rows of whole documents; a document of L tokens takes the L - 1 places of its inputs.

    Raises:
        DataError: no document has two tokens.
    """

    def __init__(self, shards: Shards, seq_len: int):
        self.shards, self.seq_len = shards, seq_len
        self.starts, self.sizes, self.divided = _pieces(shards.offsets, seq_len)
        if not len(self.sizes):
            raise DataError(f"shards {shards.path} hold no {shards.split} document of two tokens or more")
        if self.divided:
            warn(
                f"{self.divided} of {shards.documents} {shards.split} documents are longer than {seq_len} tokens and are "
                f"divided, their later pieces without what came before: raise train.seq_len to keep them whole"
            )
        row_of = best_fit(self.sizes, seq_len)
        self.rows = int(row_of.max()) + 1
        self.order = np.argsort(row_of, kind="stable")  # pieces by row
        self.first = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=self.rows))])  # (rows + 1,)

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these row numbers; a negative number is a row of padding."""
        rows = np.asarray(rows, dtype=np.int64)
        amount = np.where(rows >= 0, self.first[rows + 1] - self.first[rows], 0)  # pieces a row
        row = np.repeat(np.arange(len(rows)), amount)  # batch row of each piece
        rank = _ranges(amount)  # which of its row's pieces
        piece = self.order[np.repeat(self.first[rows], amount) + rank]
        size = self.sizes[piece]
        before = np.concatenate([[0], np.cumsum(size)])  # places filled before each piece of the batch
        row_start = before[np.cumsum(amount) - amount]  # … and before each row
        column = before[:-1] - row_start[row]
        inside = _ranges(size)
        place = np.repeat(row * self.seq_len + column, size) + inside  # flat position in the batch
        source = np.repeat(self.starts[piece], size) + inside  # position in the shards
        shape = (len(rows), self.seq_len)
        loss = True if self.shards.mask is None else self.shards.mask[source + 1] != 0
        return Batch(
            tokens=_scatter(shape, self.shards.pad_id, np.int64, place, self.shards.data[source]),
            targets=_scatter(shape, self.shards.pad_id, np.int64, place, self.shards.data[source + 1]),
            loss_mask=_scatter(shape, False, bool, place, loss),
            documents=_scatter(shape, -1, np.int32, place, np.repeat(rank, size)),
            positions=_scatter(shape, 0, np.int32, place, inside),
        )


def _pieces(offsets: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(first token, inputs) of every piece, and how many documents are divided."""
    inputs = np.diff(offsets) - 1
    amount = np.where(inputs > 0, -(-inputs // seq_len), 0)
    nth = _ranges(amount)
    starts = np.repeat(offsets[:-1], amount) + nth * seq_len
    sizes = np.minimum(np.repeat(inputs, amount) - nth * seq_len, seq_len)
    return starts, sizes, int((amount > 1).sum())


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """[2, 3] → [0, 1, 0, 1, 2]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _scatter(shape: tuple[int, int], fill: object, dtype: object, place: np.ndarray, values: object) -> np.ndarray:
    flat = np.full(shape[0] * shape[1], fill, dtype=dtype)  # type: ignore[arg-type]
    flat[place] = values
    return flat.reshape(shape)


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each piece: longest first, each into the fullest row that still holds it.

    Rows are kept by the space they have left, and the non-empty ones in the bits of one integer, so that a
    search is one shift.
    """
    row_of = np.empty(len(sizes), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    present = rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        fitting = present >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                present ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        row_of[piece] = row
        if space > size:
            by_space[space - size].append(row)
            present |= 1 << (space - size)
    return row_of
