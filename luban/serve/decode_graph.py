"""Recorded forwards in which every sequence reads one token.

B sequences, rounded up to a recorded size; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from luban.adapters.bank import Selection
from luban.generate.paged_cache import PagedCache
from luban.models.base import Model
from luban.nn.attention.packed import PackedTokens
from luban.serve.backend import PagedBackend
from luban.serve.recorded import Agree, RecordedForwards
from luban.serve.scheduler import Chunk

SMALL_SIZES = (1, 2, 4, 8, 16)
STEP = 32  # between larger sizes


def recorded_size(count: int) -> int:
    """The smallest recorded size that holds so many sequences."""
    return next((size for size in SMALL_SIZES if size >= count), -(-count // STEP) * STEP)


class DecodeGraphs(RecordedForwards):
    """A graph for every number of sequences.

    Args:
        max_sequences: most sequences of a forward.
        adapters, backend, agree: as in `RecordedForwards`.
    """

    what, needed, at_start = "single tokens", 1, SMALL_SIZES

    def __init__(
        self,
        module: Model,
        cache: PagedCache,
        max_sequences: int,
        adapters: Selection | None = None,
        backend: PagedBackend | None = None,
        agree: Agree | None = None,
    ):
        largest = recorded_size(max_sequences)
        super().__init__(module, cache, largest, largest, adapters, backend, agree)
        rows = torch.arange(largest, device=cache.device, dtype=torch.int32)
        self._items = torch.stack([rows, rows, torch.ones_like(rows), torch.zeros_like(rows)], 1)

    def run(self, chunks: Sequence[Chunk], tokens_B: Tensor | None = None) -> Tensor | None:
        """(B, V) float32 logits, overwritten by the next call; None where the chunks aren't single tokens, or nothing can
        be recorded.

        Args:
            tokens_B: on the device, in the place of the chunks' own.
        """
        if self._broken or any(chunk.count != 1 or not chunk.last for chunk in chunks):
            return None
        size = recorded_size(len(chunks))
        if size > self.largest or not self._wanted(size):
            return None
        self._fill(chunks, size, tokens_B)
        logits = self._replayed(size)
        return None if logits is None else logits[: len(chunks)]

    def _fill(self, chunks: Sequence[Chunk], size: int, tokens_B: Tensor | None = None) -> None:
        """See `RecordedForwards`."""
        self._await_copies()
        block, count = self.cache.block_size, len(chunks)
        starts = [chunk.start for chunk in chunks]
        if tokens_B is None:
            self._numbers[0, :count] = [chunk.tokens[0] for chunk in chunks]
        self._numbers[1, :count] = starts
        self._numbers[2, :count] = [
            chunk.state.table[start // block] * block + start % block
            for chunk, start in zip(chunks, starts, strict=True)
        ]
        self._copy_inputs(count, size, tokens_B)
        self.tables.write([chunk.state.table for chunk in chunks] + [[self.cache.blocks - 1]] * (size - count))
        self._copies_are_sent()

    def _forward(self, size: int) -> Tensor:
        tokens_N, positions_N, slots_N = (x[:size] for x in self._inputs)
        self._items[:size, 3] = positions_N
        packed = PackedTokens(
            positions_N=positions_N,
            slots_N=slots_N,
            tables_CM=self.tables.device[:size],
            starts=(self.module.spec.context - 1,) * size,  # as far as any sequence reaches
            counts=(1,) * size,
            block_size=self.cache.block_size,
            single_items=self._items[:size],
        )
        attention = self.backend.over(self.cache, packed)
        hidden_1NE = self.module(tokens_N[None], attention=attention, output="hidden")
        return self.module.read(hidden_1NE).squeeze(0).float()
