"""Rows of an objective: packed rows that are changed, or pieces of documents, one a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from luban.core.errors import DataError
from luban.core.seeding import generator
from luban.data.batch import Batch
from luban.data.packing import Packing
from luban.data.shards import Shards

Change = Callable[[Batch, np.ndarray, np.ndarray], Batch]


class ChangedRows:
    """The rows of a packing, each batch passed through `change(batch, rows, epochs)`."""

    def __init__(self, packing: Packing, change: Change):
        self.packing, self.change, self.rows = packing, change, packing.rows

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these rows in these epochs."""
        rows = np.asarray(rows)
        return self.change(self.packing.gather(rows), rows, _epochs(rows, epochs))


class DocumentPieces:
    """Documents without their begin and end tokens, cut into pieces of at most `longest` tokens, one a row.

    A subclass says in `make` what a batch of pieces becomes.

    Raises:
        DataError: no document has `shortest` tokens.
    """

    def __init__(self, shards: Shards, *, longest: int, shortest: int, seed: int):
        if longest < shortest:
            raise DataError(
                f"rows of this objective need at least {shortest} tokens of text, and train.seq_len allows "
                f"{longest}: raise train.seq_len"
            )
        self.shards, self.seed = shards, seed
        begin = shards.config["bos_id"] is not None
        starts, stops = shards.offsets[:-1] + begin, shards.offsets[1:] - 1
        sizes = np.maximum(stops - starts, 0)
        amount = -(-sizes // longest)
        nth = np.arange(amount.sum()) - np.repeat(np.cumsum(amount) - amount, amount)
        self.document = np.repeat(np.arange(len(sizes)), amount)  # of each piece
        self.starts = starts[self.document] + nth * longest
        self.sizes = np.minimum(sizes[self.document] - nth * longest, longest)
        kept = self.sizes >= shortest
        self.document, self.starts, self.sizes = self.document[kept], self.starts[kept], self.sizes[kept]
        self.rows = len(self.starts)
        if not self.rows:
            raise DataError(f"shards {shards.path} hold no {shards.split} document of {shortest} tokens or more")

    def piece(self, row: int) -> np.ndarray:
        """The tokens of one row, int64."""
        start = self.starts[row]
        return self.shards.data[start : start + self.sizes[row]].astype(np.int64)

    def draw(self, *names: str | int) -> np.random.Generator:
        """A generator for this purpose."""
        return generator(self.seed, *names)

    def gather(self, rows: np.ndarray, epochs: np.ndarray | None = None) -> Batch:
        """The batch of these rows in these epochs."""
        rows = np.asarray(rows)
        return self.make([(int(r), int(e)) for r, e in zip(rows, _epochs(rows, epochs), strict=True)])

    def make(self, places: list[tuple[int, int]]) -> Batch:
        """The batch of these (row, epoch); a negative row is a row of padding."""
        raise NotImplementedError


def _epochs(rows: np.ndarray, epochs: np.ndarray | None) -> np.ndarray:
    return np.zeros_like(rows) if epochs is None else np.asarray(epochs)


def pad_rows(rows: Sequence[Sequence[int] | np.ndarray], length: int, fill: int, dtype: type = np.int64) -> np.ndarray:
    """(B, length), each row filled up on the right."""
    out = np.full((len(rows), length), fill, dtype=dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def poisson_spans(rng: np.random.Generator, size: int, budget: int, mean: float, most: int) -> list[tuple[int, int]]:
    """Disjoint spans [start, stop) of lengths ~ Poisson(mean), at least 1, that hold `budget` of `size` tokens.

    Lengths are drawn until they fill the budget, the last one cut to it (and the `most`-th, when so many are
    drawn); then the gaps between them are drawn evenly, so that any two are at least a token apart.
    """
    lengths: list[int] = []
    while sum(lengths) < budget and len(lengths) < most:
        lengths.append(min(max(int(rng.poisson(mean)), 1), budget - sum(lengths)))
    free = size - sum(lengths) - (len(lengths) - 1)  # tokens that may stand anywhere between
    if free < 0:
        return [(0, min(budget, size))]
    cuts = np.sort(rng.integers(0, free + 1, len(lengths)))
    spans, used = [], 0
    for i, length in enumerate(lengths):
        start = int(cuts[i]) + used + i
        spans.append((start, start + length))
        used += length
    return spans


def round_randomly(rng: np.random.Generator, value: float) -> int:
    """`value` rounded up or down at random, so that its mean is kept."""
    return int(value) + int(rng.random() < value - int(value))
