"""One forward over the tokens of all scheduled sequences, packed into a single row.

N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from luban.generate.host_blocks import HostBlocks
from luban.generate.paged_cache import PagedCache
from luban.models.base import Model
from luban.models.encoder_decoder import EncoderDecoder
from luban.nn.attention.packed import PackedTokens
from luban.nn.host_copies import sent
from luban.nn.invariant import InvariantElements
from luban.serve.adapters import AdapterPool
from luban.serve.backend import PagedBackend
from luban.serve.decode_graph import DecodeGraphs
from luban.serve.prompt_graph import PromptGraphs
from luban.serve.scheduler import Chunk, Step
from luban.serve.source_runner import SourceRunner


class ModelRunner:
    """Runs a decoder, or an encoder–decoder, over chunks of sequences.

    Args:
        module: of which `luban.generate.paged_cache.paging_refusal` says nothing.
        cache: its pool.
        kernel: of attention, by name; None: the fastest that can serve.
        graphs: recorded forwards of single tokens; None: there are none. prompts: of chunks.
        host: of preempted sequences; None: nothing is swapped.
        backend: of attention; None: of all heads.
        adapters: of the sequences.
    """

    def __init__(
        self,
        module: Model,
        cache: PagedCache,
        kernel: str | None = None,
        graphs: DecodeGraphs | None = None,
        host: HostBlocks | None = None,
        backend: PagedBackend | None = None,
        adapters: AdapterPool | None = None,
        prompts: PromptGraphs | None = None,
    ):
        self.host, self.backend, self.adapters = host, backend or PagedBackend(), adapters
        self.module, self.cache, self.kernel, self.graphs = module.eval(), cache, kernel, graphs
        self.prompts = prompts
        self.sources: SourceRunner | None = None
        if isinstance(module, EncoderDecoder):
            self.sources = SourceRunner(module, cache, kernel, self.backend.kind)

    @torch.inference_mode()
    def copy(self, step: Step) -> None:
        """Copy blocks as a step asks for before its forward."""
        if self.host is not None:
            self.host.swap_out(step.swaps_out)
        self.cache.copy(step.copies)
        if self.host is not None:
            self.host.swap_in(step.swaps_in)

    @torch.inference_mode()
    def run(
        self,
        chunks: Sequence[Chunk],
        inspect: Callable[[Chunk, Tensor], None] | None = None,
        tokens_N: Tensor | None = None,
    ) -> Tensor:
        """Read the chunks; running them again changes nothing. Returns float32 logits (R, V) of what follows them, where
        they end their sequence, and of what follows each of their guesses, in their order; the next call may overwrite them.

        Args:
            inspect: called for each chunk of which tokens are scored, with their hidden states (scored, E).
            tokens_N: on the device, to be read in the place of the chunks' own, which are single ones.
        """
        if self.adapters is None:
            return self._run(chunks, inspect, tokens_N, recorded=True)
        with self.adapters.selected(chunks) as recorded:
            return self._run(chunks, inspect, tokens_N, recorded=recorded)

    def _run(
        self,
        chunks: Sequence[Chunk],
        inspect: Callable[[Chunk, Tensor], None] | None,
        tokens_N: Tensor | None,
        *,
        recorded: bool,
    ) -> Tensor:
        """See `run`; `recorded`: whether a recorded forward may be used."""
        if recorded and self.graphs is not None and (logits := self.graphs.run(chunks, tokens_N)) is not None:
            return logits
        if tokens_N is not None:
            return self._forward(chunks, None, tokens_N)
        if recorded and self.prompts is not None and (hidden_1NE := self.prompts.run(chunks)) is not None:
            return self._logits(hidden_1NE, chunks, inspect)
        return self._read(chunks, inspect)

    def clear_graphs(self) -> None:
        """Forget what was recorded: weights lie elsewhere."""
        for graphs in (self.graphs, self.prompts):
            if graphs is not None:
                graphs.clear()

    def _read(self, chunks: Sequence[Chunk], inspect: Callable[[Chunk, Tensor], None] | None) -> Tensor:
        """See `run`; without recorded graphs."""
        if not self.backend.kind.invariant:
            return self._forward(chunks, inspect)
        with InvariantElements():  # a token alone is read twice, since single rows have code of their own
            alone = len(chunks) == 1 and chunks[0].count == 1
            return self._forward([*chunks, *chunks] if alone else chunks, inspect)[: sum(c.wanted for c in chunks)]

    def _forward(
        self,
        chunks: Sequence[Chunk],
        inspect: Callable[[Chunk, Tensor], None] | None,
        given_N: Tensor | None = None,
    ) -> Tensor:
        """See `run`; as one packed row."""
        if self.adapters is not None:
            self.adapters.choose(chunks)
            self.adapters.selection.place()
        tokens_N, packed = self._packed(chunks)
        tokens_N = tokens_N if given_N is None else given_N
        if self.sources is None:
            attention = self.backend.over(self.cache, packed, self.kernel)
            hidden_1NE = self.module(tokens_N[None], attention=attention, output="hidden")
        else:
            hidden_1NE = self.sources.forward(tokens_N, packed, chunks)
        return self._logits(hidden_1NE, chunks, inspect)

    def _logits(
        self, hidden_1NE: Tensor, chunks: Sequence[Chunk], inspect: Callable[[Chunk, Tensor], None] | None
    ) -> Tensor:
        """(R, V) of the wanted rows."""
        rows, row = [], -1
        for chunk in chunks:
            if inspect is not None and chunk.scored:
                inspect(chunk, hidden_1NE[0, row + 1 : row + 1 + chunk.scored])
            row += chunk.count
            rows += range(row + 1 - chunk.wanted, row + 1)
        wanted = sent(rows, hidden_1NE.device, torch.long)
        return self.module.read(hidden_1NE[:, wanted]).squeeze(0).float()

    def _packed(self, chunks: Sequence[Chunk]) -> tuple[Tensor, PackedTokens]:
        """(N,) tokens of the chunks one after another, and where they stand."""
        device, size = self.cache.device, self.cache.block_size
        tokens, positions, slots = [], [], []
        for chunk in chunks:
            end = chunk.start + chunk.count
            at = np.arange(chunk.start, end)
            tokens.append(np.asarray(chunk.tokens, dtype=np.int64))
            positions.append(at)
            slots.append(np.asarray(chunk.state.table, dtype=np.int64)[at // size] * size + at % size)
        numbers = np.stack([np.concatenate(each) for each in (tokens, positions, slots)])
        longest = max(len(chunk.state.table) for chunk in chunks)
        tables = [chunk.state.table + [0] * (longest - len(chunk.state.table)) for chunk in chunks]
        tokens_N, positions_N, slots_N = torch.from_numpy(numbers).to(device, non_blocking=True)
        packed = PackedTokens(
            positions_N=positions_N,
            slots_N=slots_N,
            tables_CM=torch.tensor(tables, dtype=torch.int32).to(device, non_blocking=True),
            starts=tuple(chunk.start for chunk in chunks),
            counts=tuple(chunk.count for chunk in chunks),
            block_size=size,
        )
        return tokens_N, packed


def weights_version(module: Model) -> tuple[tuple[int, int], ...]:
    """Another value whenever torch has changed a parameter or put another in its place; changes by kernels of one's own go
    unnoticed."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in module.parameters())
