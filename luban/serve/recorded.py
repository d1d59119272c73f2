"""Forwards recorded as CUDA graphs: one launch in the place of hundreds, for each size that they are recorded for.

N tokens, rounded up to a recorded size; M blocks of a table.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from luban.adapters.bank import Selection
from luban.core.log import warn
from luban.generate.paged_cache import PagedCache
from luban.models.base import Model
from luban.serve.backend import PagedBackend
from luban.serve.scheduler import Chunk

Agree = Callable[[bool], bool]


class RecordedForwards:
    """Forwards by size. A size is recorded when it has been asked for `needed` times. A forward of fewer tokens is padded; keys and
    values of the padding go into the pool's last block, which no sequence may hold.

    Args:
        module: its weights may change in place; `clear` where they are put elsewhere.
        cache: on a CUDA device; on another one nothing is recorded, and every forward runs as it is.
        largest: most tokens of a forward.
        sequences: most sequences of a forward.
        adapters: those of the sequences; forwards in which some have one are recorded apart.
        backend: of attention; None: of all heads.
        agree: whether something went well in all processes that divide the model, which all ask; None: there are no others.
    """

    what: ClassVar[str]  # named by the warning that recording failed
    needed: ClassVar[int]  # how often a size must be asked for before it is recorded
    at_start: ClassVar[Sequence[int]]  # sizes that are recorded before anything is asked for

    def __init__(
        self,
        module: Model,
        cache: PagedCache,
        largest: int,
        sequences: int,
        adapters: Selection | None = None,
        backend: PagedBackend | None = None,
        agree: Agree | None = None,
    ):
        self.backend, self._agree = backend or PagedBackend(), agree
        self.module, self.cache, self.largest, self.adapters = module, cache, largest, adapters
        blocks, on_gpu = -(-module.spec.context // cache.block_size), cache.device.type == "cuda"
        self.tables = BlockTables(sequences, blocks, cache.device)
        self._host = torch.zeros(3, largest, dtype=torch.int64, pin_memory=on_gpu)  # tokens, positions, slots
        self._numbers = self._host.numpy()
        self._inputs = [torch.zeros(largest, dtype=torch.int64, device=cache.device) for _ in range(3)]
        self._asked: dict[tuple[int, bool], int] = {}  # by size, and whether there are adapters
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._copied = torch.cuda.Event() if on_gpu else None
        self._changed = 0  # as `adapters` counted when the last one was recorded
        self._pool = torch.cuda.graph_pool_handle() if on_gpu else None
        self._broken = False

    @torch.inference_mode()
    def start(self) -> None:
        """Record the sizes that most forwards have, so that no request waits until that, or a kernel's compilation, is done."""
        for size in self.at_start:
            if size <= self.largest and not self._broken:
                self._fill((), size)
                self._replayed(size)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._graphs.clear()

    def _replayed(self, size: int) -> Tensor | None:
        """The result of the forward of this size over the inputs that were copied last; the next call overwrites it. None where
        recording fails."""
        if self._pool is None:
            return self._forward(size)
        key = self._key(size)
        if key not in self._graphs:
            failed: RuntimeError | None = None
            try:
                self._graphs[key] = self._record(size)
            except RuntimeError as error:
                failed = error
                _leave_recording()
            if not (failed is None if self._agree is None else self._agree(failed is None)):
                self._broken = True
                self._graphs.clear()
                warn(f"{self.what} are read without a CUDA graph, which costs launches: {failed or 'another process'}")
                return None
        graph, found = self._graphs[key]
        graph.replay()
        return found

    def _wanted(self, size: int) -> bool:
        """Whether a forward of this size is, or is to be, recorded."""
        if self.adapters is not None and self._changed != self.adapters.changed:
            self._graphs = {key: graph for key, graph in self._graphs.items() if not key[1]}
            self._changed = self.adapters.changed
        key = self._key(size)
        self._asked[key] = self._asked.get(key, 0) + 1
        return key in self._graphs or self._asked[key] >= self.needed

    def _key(self, size: int) -> tuple[int, bool]:
        return size, self.adapters is not None and self.adapters.stacked

    def _await_copies(self) -> None:
        """Wait until the last forward's inputs have been copied, before the host's buffers are filled anew."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copies_are_sent(self) -> None:
        """Remember that all copies of this forward's inputs have been submitted."""
        if self._copied is not None:
            self._copied.record()

    def _copy_inputs(self, count: int, size: int, tokens_N: Tensor | None = None) -> None:
        """Copy the first `count` tokens, positions and slots to the device, and padding up to `size`; which of them use
        which adapter, too. `tokens_N`: on the device, in the place of the host's; behind them any may stand."""
        if self.adapters is not None:
            self.adapters.place(size)
        last = self.cache.blocks - 1
        self._numbers[:2, count:size] = 0
        self._numbers[2, count:size] = last * self.cache.block_size
        if tokens_N is not None:
            self._inputs[0][:count].copy_(tokens_N)
        for row, target in enumerate(self._inputs):
            if row or tokens_N is None:
                target[:size].copy_(self._host[row, :size], non_blocking=True)

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The graph of one size and where its result is. What is recorded has been run before, so that all kernels are
        compiled."""
        self._forward(size)
        torch.cuda.synchronize(self.cache.device)
        graph = torch.cuda.CUDAGraph()
        # threads that watch over messages between processes may ask the device meanwhile
        errors = "global" if self._agree is None else "thread_local"
        with _no_garbage_collection(), torch.cuda.graph(graph, pool=self._pool, capture_error_mode=errors):
            found = self._forward(size)
        return graph, found

    def _fill(self, chunks: Sequence[Chunk], size: int) -> None:
        """Copy what a forward of this size over these chunks reads to the device; the rest of it is padding."""
        raise NotImplementedError

    def _forward(self, size: int) -> Tensor:
        """What is recorded."""
        raise NotImplementedError


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
    """End a failed recording for torch's random generator, whose state stays that of a recording until another one succeeds."""
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")
