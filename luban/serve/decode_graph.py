"""Forwards in which every sequence reads one token, recorded as CUDA graphs: a launch in the place of hundreds.

B sequences, rounded up to a recorded size; M blocks of a table, V vocabulary.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from luban.core.log import warn
from luban.generate.paged_cache import PagedCache
from luban.models.base import Model
from luban.nn.attention.packed import PackedTokens
from luban.nn.attention.paged import PagedAttention
from luban.serve.scheduler import Chunk

SMALL_SIZES = (1, 2, 4, 8, 16)
STEP = 32  # between larger sizes


def recorded_size(count: int) -> int:
    """The smallest recorded size that holds so many sequences."""
    return next((size for size in SMALL_SIZES if size >= count), -(-count // STEP) * STEP)


class DecodeGraphs:
    """Records a graph for a size when it is first needed. Rows beyond the sequences read a token of no meaning into the
    pool's last block, which no sequence may hold.

    Args:
        module: its weights may change in place; `clear` where they are put elsewhere.
        cache: on a CUDA device.
        max_sequences: that are ever read together.
    """

    def __init__(self, module: Model, cache: PagedCache, max_sequences: int):
        self.module, self.cache = module, cache
        largest, blocks = recorded_size(max_sequences), -(-module.spec.context // cache.block_size)
        self._host = torch.zeros(3, largest, dtype=torch.int64).pin_memory()  # tokens, positions, slots
        self._numbers = self._host.numpy()
        self._inputs = [torch.zeros(largest, dtype=torch.int64, device=cache.device) for _ in range(3)]
        self._tables = BlockTables(largest, blocks, cache.device)
        rows = torch.arange(largest, device=cache.device, dtype=torch.int32)
        self._items = torch.stack([rows, rows, torch.ones_like(rows), torch.zeros_like(rows)], 1)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._broken = False

    def clear(self) -> None:
        """Forget what was recorded."""
        self._graphs.clear()

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """(B, V) float32 logits, overwritten by the next call; None where the chunks aren't single tokens, or nothing can
        be recorded."""
        if self._broken or any(chunk.count != 1 or not chunk.last for chunk in chunks):
            return None
        size = recorded_size(len(chunks))
        if size > self._tables.rows:
            return None
        self._fill(chunks, size)
        if size not in self._graphs:
            try:
                self._graphs[size] = self._record(size)
            except RuntimeError as error:
                self._broken = True
                _leave_recording()
                warn(f"single tokens are read without a CUDA graph, which costs launches: {error}")
                return None
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[: len(chunks)]

    def _fill(self, chunks: Sequence[Chunk], size: int) -> None:
        """Copy what the graph reads to the device."""
        block, count = self.cache.block_size, len(chunks)
        starts = [chunk.start for chunk in chunks]
        self._numbers[0, :count] = [chunk.tokens[0] for chunk in chunks]
        self._numbers[1, :count] = starts
        self._numbers[2, :count] = [
            chunk.state.table[start // block] * block + start % block
            for chunk, start in zip(chunks, starts, strict=True)
        ]
        last = self.cache.blocks - 1
        self._numbers[:2, count:size] = 0
        self._numbers[2, count:size] = last * block
        for row, target in enumerate(self._inputs):
            target[:size].copy_(self._host[row, :size], non_blocking=True)
        self._tables.write([chunk.state.table for chunk in chunks] + [[last]] * (size - count))

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of one size and where its logits are. What is recorded has been run before, so that all kernels are
        compiled."""
        self._forward(size)
        torch.cuda.synchronize(self.cache.device)
        graph = torch.cuda.CUDAGraph()
        with _no_garbage_collection(), torch.cuda.graph(graph, pool=self._pool):
            logits = self._forward(size)
        return graph, logits

    def _forward(self, size: int) -> Tensor:
        tokens_N, positions_N, slots_N = (x[:size] for x in self._inputs)
        self._items[:size, 3] = positions_N
        packed = PackedTokens(
            positions_N=positions_N,
            slots_N=slots_N,
            tables_CM=self._tables.device[:size],
            starts=(self.module.spec.context - 1,) * size,  # as far as any sequence reaches
            counts=(1,) * size,
            block_size=self.cache.block_size,
            single_items=self._items[:size],
        )
        attention = PagedAttention(self.cache.layers, packed)
        hidden_1NE = self.module(tokens_N[None], attention=attention, output="hidden")
        return self.module.read(hidden_1NE).squeeze(0).float()


class BlockTables:
    """Tables of blocks on a device, of which only those are written that have changed: most of a step's are the last step's.

    Args:
        rows: tables at most. blocks: of a table at most.
    """

    def __init__(self, rows: int, blocks: int, device: torch.device):
        self.rows = rows
        self.device = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self._host = torch.zeros(rows, blocks, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._numbers = self._host.numpy()
        self._written: list[list[int]] = [[]] * rows

    def write(self, tables: Sequence[list[int]]) -> None:
        """Put tables into the first rows of `device`; what lies behind a table's end is of no meaning."""
        widest = 0
        for row, table in enumerate(tables):
            if self._written[row] != table:
                self._numbers[row, : len(table)] = table
                self._written[row] = table[:]
                widest = max(widest, len(table))
        if widest:
            part = slice(len(tables)), slice(widest)
            self.device[part].copy_(self._host[part], non_blocking=True)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nothing is collected inside: freeing another graph or its memory would end the recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _leave_recording() -> None:
    """After a recording that failed torch's random generator believes that it goes on; another one that ends well ends it."""
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
