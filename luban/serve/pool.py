"""A runner over a pool of keys and values, made alike in every process that holds a part of the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from luban.core.errors import UnsupportedError
from luban.generate.host_blocks import HostBlocks
from luban.generate.paged_cache import BLOCK_SIZE, PagedCache
from luban.models.base import Model
from luban.nn.attention.paged import PagedAttention, kernel_serves
from luban.nn.attention.paged_invariant import InvariantPagedAttention
from luban.nn.float8 import E4M3, require_float8
from luban.nn.invariant import use_invariant_matmuls
from luban.nn.linear import lay_adjacent
from luban.parallel.heads import HeadRange
from luban.serve.adapters import AdapterPool
from luban.serve.backend import PagedBackend
from luban.serve.decode_graph import DecodeGraphs, recorded_size
from luban.serve.memory import SHARE, PagedBudget
from luban.serve.model_runner import ModelRunner
from luban.serve.prompt_graph import PromptGraphs, chunk_step, recorded_tokens
from luban.serve.recorded import Agree

MAX_BATCH = 256  # sequences that run together
MAX_TOKENS = {"cuda": 8192}  # that a forward reads, by device …
OTHER_MAX_TOKENS = 512  # … and elsewhere


class Divided(Protocol):
    """The processes that hold a model together, as one of them sees them."""

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    @property
    def heads(self) -> HeadRange:
        """The heads that are here."""
        ...

    def smallest(self, number: int) -> int:
        """The smallest of the processes' numbers; all ask."""
        ...

    def agree(self, fine: bool) -> bool:
        """Whether it is so in all; all ask."""
        ...


@dataclass(frozen=True, kw_only=True)
class PoolSettings:
    """What decides about a pool, beside model and device."""

    max_batch: int | None = None  # sequences that run together; none: 256
    max_tokens: int | None = (
        None  # that a forward reads; none: 8,192 on CUDA, 512 elsewhere, twice `max_batch` at least
    )
    cache_bytes: int | None = None  # for keys and values in each process; none: what `PagedBudget.of` finds
    block_size: int = BLOCK_SIZE  # slots a block
    cache_dtype: str = "auto"  # of keys and values: auto, the model's, or fp8
    kernel: str | None = None  # of attention
    swap_bytes: int = 0  # of each process's host memory for preempted sequences
    batch_invariant: bool = False  # outputs are bit for bit those of a request alone

    @property
    def kept(self) -> torch.dtype | None:
        """See `PagedBackend`. Raises UnsupportedError for another name, and for a GPU that has no fp8."""
        if self.cache_dtype == "auto":
            return None
        if self.cache_dtype != "fp8":
            raise UnsupportedError(f"keys and values are kept in auto or fp8, '{self.cache_dtype}' given")
        return E4M3

    def sequences(self) -> int:
        """That run together."""
        return self.max_batch or MAX_BATCH

    def tokens(self, device: str) -> int:
        """That a forward reads."""
        return self.max_tokens or max(MAX_TOKENS.get(device, OTHER_MAX_TOKENS), 2 * self.sequences())


@dataclass(frozen=True)
class Pool:
    """A runner, and what it has memory for."""

    runner: ModelRunner
    budget: PagedBudget
    blocks: int  # of the device
    host_blocks: int  # of the host, for preempted sequences


def make_pool(
    module: Model,
    settings: PoolSettings,
    *,
    draft: Model | None = None,
    adapters: AdapterPool | None = None,
    divided: Divided | None = None,
    runner: Callable[..., ModelRunner] = ModelRunner,
) -> Pool:
    """The pool of a model's keys and values, and what runs the model over it. Weights may be moved, and matmuls replaced.

    Args:
        module: of which `luban.generate.paged_cache.paging_refusal` says nothing; of a divided model, this process's part.
        draft: a model whose keys and values need memory too.
        adapters: of which sequences may have one.
        divided: the processes that hold the model together, of which each makes its pool now; None: there is one.
        runner: makes the runner.
    """
    device = next(module.parameters()).device.type
    for each in (module, draft):
        if each is not None and device == "cuda":
            lay_adjacent(each)
        if each is not None and settings.batch_invariant:
            use_invariant_matmuls(each)
    kind = InvariantPagedAttention if settings.batch_invariant else PagedAttention
    backend = PagedBackend(kind, None if divided is None else divided.heads, settings.kept)
    if backend.kept is not None and device == "cuda":
        require_float8(
            next(module.parameters()).device, "keep keys and values in their own precision (--cache-dtype auto)"
        )
    sequences, tokens, size = settings.sequences(), settings.tokens(device), settings.block_size
    if adapters is not None:
        adapters.start(max(recorded_tokens(tokens), recorded_size(sequences)))
    recorded = device == "cuda" and settings.kernel is None and not settings.batch_invariant
    recorded = recorded and not module.spec.body.two_sided
    recorded = recorded and all(shape is None or kernel_serves(shape) for shape in backend.shapes(module))
    budget = PagedBudget.of(
        module,
        settings.cache_bytes,
        block_size=size,
        max_sequences=sequences,
        max_tokens=tokens,
        draft=draft,
        recorded=recorded,
        backend=backend,
        share=SHARE if divided is None else SHARE / divided.size,
    )
    blocks, host_blocks = budget.slots // size, int(settings.swap_bytes) // (budget.slot_bytes * size)
    if divided is not None:
        blocks, host_blocks = divided.smallest(blocks), divided.smallest(host_blocks)
        budget = replace(budget, slots=blocks * size)
    cache = backend.cache(module, blocks=blocks + recorded, block_size=size)  # one for rows of no meaning
    agree = None if divided is None else divided.agree
    graphs, prompts = None, None
    if recorded:
        graphs, prompts = recorded_forwards(module, cache, sequences, tokens, adapters, backend, agree)
        for each in (graphs, prompts):
            if each is not None:
                each.start()
    host = HostBlocks(cache, host_blocks) if host_blocks else None
    made = runner(module, cache, settings.kernel, graphs, host, backend, adapters, prompts)
    return Pool(made, budget, blocks, host_blocks)


def recorded_forwards(
    module: Model,
    cache: PagedCache,
    sequences: int,
    tokens: int,
    adapters: AdapterPool | None,
    backend: PagedBackend | None = None,
    agree: Agree | None = None,
) -> tuple[DecodeGraphs, PromptGraphs | None]:
    """Of single tokens and of prompts: of at most so many sequences, and tokens, together."""
    step, selection = chunk_step(cache), None if adapters is None else adapters.selection
    prompts = None
    everywhere = agree is None or agree(step is not None)  # parts of a model may have different heads
    if step is not None and everywhere:
        prompts = PromptGraphs(
            module,
            cache,
            step,
            max_sequences=sequences,
            max_tokens=tokens,
            adapters=selection,
            backend=backend,
            agree=agree,
        )
    return DecodeGraphs(module, cache, sequences, selection, backend, agree), prompts
