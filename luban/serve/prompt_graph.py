"""Recorded forwards over chunks of prompts, with the single tokens of other sequences among them.

N tokens, rounded up to a recorded size; C sequences; E width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from luban.adapters.bank import Selection
from luban.generate.paged_cache import PagedCache
from luban.models.base import Model
from luban.nn.attention.packed import PackedTokens
from luban.serve.backend import PagedBackend
from luban.serve.recorded import Agree, RecordedForwards
from luban.serve.scheduler import Chunk

SMALLEST = 16  # tokens
MANY = 1024  # tokens; up to here sizes are powers of two
PARTS = 4  # sizes from one larger power of two to the next, so that at most a fifth of a forward is padding


def recorded_tokens(count: int) -> int:
    """The smallest recorded size that holds so many tokens."""
    size = max(SMALLEST, 1 << (count - 1).bit_length())
    if size <= MANY:
        return size
    step = size // 2 // PARTS
    return -(-count // step) * step


class PromptGraphs(RecordedForwards):
    """A graph for every number of tokens, however they are divided among sequences.

    Args:
        step: tokens of a piece of a chunk (`chunk_step`).
        max_sequences: most sequences of a forward. max_tokens: most tokens.
        kernel: of attention, by name; None: the fastest.
        adapters, backend, agree: as in `RecordedForwards`.
    """

    what, needed = "prompts", 2  # recording costs more than one forward saves
    at_start = tuple(1 << power for power in range(SMALLEST.bit_length() - 1, MANY.bit_length()))

    def __init__(
        self,
        module: Model,
        cache: PagedCache,
        step: int,
        *,
        max_sequences: int,
        max_tokens: int,
        kernel: str | None = None,
        adapters: Selection | None = None,
        backend: PagedBackend | None = None,
        agree: Agree | None = None,
    ):
        super().__init__(module, cache, recorded_tokens(max_tokens), max_sequences, adapters, backend, agree)
        self.kernel, self._sequences, self._step = kernel, max_sequences, step
        most = self._items(self.largest) + max_sequences
        self._host_work = torch.zeros(most, 5, dtype=torch.int32, pin_memory=cache.device.type == "cuda")
        self._work = torch.zeros(most, 5, dtype=torch.int32, device=cache.device)

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """(1, N, E) hidden states of the chunks' tokens, overwritten by the next call; None where nothing is recorded, or not
        yet."""
        count = sum(chunk.count for chunk in chunks)
        size = recorded_tokens(count)
        if self._broken or size > self.largest or len(chunks) > self._sequences or not self._wanted(size):
            return None
        self._fill(chunks, size)
        hidden_1NE = self._replayed(size)
        return None if hidden_1NE is None else hidden_1NE[:, :count]

    def _items(self, size: int) -> int:
        """Work of chunks at most: one more than its tokens fill for each of them."""
        return size // self._step + min(self._sequences, size // 2)

    def _fill(self, chunks: Sequence[Chunk], size: int) -> None:
        """See `RecordedForwards`."""
        self._await_copies()
        block, row, items, singles = self.cache.block_size, 0, [], []
        for index, chunk in enumerate(chunks):
            end, to = chunk.start + chunk.count, slice(row, row + chunk.count)
            at = np.arange(chunk.start, end)
            self._numbers[0, to], self._numbers[1, to] = chunk.tokens, at
            self._numbers[2, to] = np.asarray(chunk.state.table)[at // block] * block + at % block
            if chunk.count == 1:
                singles.append((index, row, 1, chunk.start, chunk.start))
            else:
                items += [
                    (index, row + i, min(self._step, chunk.count - i), chunk.start + i, chunk.start)
                    for i in range(0, chunk.count, self._step)
                ]
            row += chunk.count
        items.sort(key=lambda item: -item[3])  # the longest first, so that none is waited for at the end
        self._copy_inputs(row, size)
        first, work = self._items(size), self._host_work.numpy()
        last = first + min(self._sequences, size)
        work[:last] = 0, -1, 0, 0, 0  # no tokens and no row: nothing to do
        for at, rows in ((0, items), (first, singles)):
            if rows:
                work[at : at + len(rows)] = rows
        self._work[:last].copy_(self._host_work[:last], non_blocking=True)
        self.tables.write([chunk.state.table for chunk in chunks])
        self._copies_are_sent()

    def _forward(self, size: int) -> Tensor:
        tokens_N, positions_N, slots_N = (x[:size] for x in self._inputs)
        first = self._items(size)
        packed = PackedTokens(
            positions_N=positions_N,
            slots_N=slots_N,
            tables_CM=self.tables.device,
            starts=(self.module.spec.context - 1,),  # as far as any sequence reaches
            counts=(1,),
            block_size=self.cache.block_size,
            single_items=self._work[first : first + min(self._sequences, size), :4],
            chunk_items=self._work[:first],
        )
        attention = self.backend.over(self.cache, packed, self.kernel)
        return self.module(tokens_N[None], attention=attention, output="hidden")


def chunk_step(cache: PagedCache) -> int | None:
    """Tokens of the pieces that the kernel divides a chunk into; None where layers divide it in different ways."""
    from luban.kernels.paged_launch import chunk_tokens, padded_width

    steps = set()
    for shape, place in zip(cache.shapes, cache.layers, strict=True):
        if shape is not None and place is not None:
            width = padded_width(shape.head_dim) * place.dtype.itemsize
            steps.add(chunk_tokens(shape.heads, shape.key_heads, width))
    return steps.pop() if len(steps) == 1 else None
