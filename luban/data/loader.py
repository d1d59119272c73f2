"""Batches by number: each is a pure function of seed and step, so that a resume needs nothing but the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice

import numpy as np

from luban.core.errors import ConfigError
from luban.core.seeding import generator
from luban.data.batch import Batch
from luban.data.packing import PACKINGS, Packing
from luban.data.shards import Shards

AHEAD = 4  # batches prefetched a worker


class Loader:
    """Shuffled batches of a split, epoch after epoch.

    Args:
        batch_size: sequences a step over all ranks; must divide by `world`.
        seq_len: input tokens a sequence, T.
        seed: of the order.
        packing: "stream" (windows over all text), "fit" (whole documents and padding), or rows already made.
        workers: threads that prepare batches ahead; the batches are the same for any number.
        rank, world: this process's share of every batch: an equal part of the rows of each micro-batch.
        micro_batches: that a batch is cut into; its share of the first comes first.

    Raises:
        ConfigError: sizes that make no batch.
        DataError: the split is smaller than one sequence.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        packing: str | Packing = "stream",
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_batches: int = 1,
    ):
        if batch_size < 1 or seq_len < 1:
            raise ConfigError(f"batch_size and seq_len must be at least 1 ({batch_size} and {seq_len} given)")
        if not 0 <= rank < world or batch_size % (world * micro_batches):
            cut = f" in {micro_batches} micro-batches" * (micro_batches > 1)
            raise ConfigError(
                f"a batch of {batch_size} sequences{cut} cannot be shared by {world} ranks (this is rank {rank})"
            )
        self.shards, self.seed, self.workers = shards, seed, workers
        self.batch_size, self.seq_len = batch_size, seq_len
        self._share = np.arange(batch_size).reshape(micro_batches, world, -1)[:, rank].reshape(-1)
        self.packing: Packing = PACKINGS[packing](shards, seq_len) if isinstance(packing, str) else packing
        self._orders: dict[int, np.ndarray] = {}

    @property
    def sequences_per_epoch(self) -> int:
        """Rows that hold every document once."""
        return self.packing.rows

    def epoch_of(self, step: int) -> int:
        """The epoch in which the first sequence of this step lies, from 0."""
        return step * self.batch_size // self.packing.rows

    def batch(self, step: int, share: np.ndarray | None = None) -> Batch:
        """This rank's share of the batch of a step, from 0; (B / world, T) arrays.

        Args:
            share: indices of rows in the batch that are read instead.
        """
        sequences = step * self.batch_size + (self._share if share is None else share)
        epochs, places = np.divmod(sequences, self.packing.rows)
        rows = np.empty_like(sequences)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            rows[here] = self._order(epoch)[places[here]]
        return self.packing.gather(rows, epochs)

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = generator(self.seed, "epoch", epoch).permutation(self.packing.rows)
            # A batch spans few epochs: keep the last ones. A new dict, since threads read the old.
            self._orders = {**{e: o for e, o in self._orders.items() if e >= epoch - 1}, epoch: order}
        return order

    def iterate(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches from `start_step` on, without end, prepared ahead by `workers` threads."""
        return self.shares((step, self._share) for step in count(start_step))

    def shares(self, wanted: Iterator[tuple[int, np.ndarray]]) -> Iterator[Batch]:
        """A batch for each (step, indices of rows in its batch), prepared ahead by `workers` threads."""
        if not self.workers:
            for step, share in wanted:
                yield self.batch(step, share)
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="loader") as pool:
            waiting: deque[Future[Batch]] = deque()
            try:
                while True:
                    for step, share in islice(wanted, self.workers * AHEAD - len(waiting)):
                        waiting.append(pool.submit(self.batch, step, share))
                    if not waiting:
                        return
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def sequential_batches(
    shards: Shards, batch_size: int, seq_len: int, packing: str | Packing | None = None, batches: int = 0
) -> Iterator[Batch]:
    """Every row of a split once and in order, for evaluation; the last batch is filled up with padding rows.

    Args:
        packing: by default "fit" for conversations, whose answers need their questions, else "stream";
            or rows already made.
        batches: at most so many batches, of rows spread evenly over the split; 0: all rows.

    Raises:
        DataError: the split is smaller than one sequence.
    """
    packing = packing or ("fit" if shards.has_mask else "stream")
    packed = PACKINGS[packing](shards, seq_len) if isinstance(packing, str) else packing
    taken = min(batches * batch_size or packed.rows, packed.rows)
    spread = np.arange(taken) * packed.rows // taken
    for start in range(0, taken, batch_size):
        rows = np.full(batch_size, -1)
        rows[: len(spread[start : start + batch_size])] = spread[start : start + batch_size]
        yield packed.gather(rows)
