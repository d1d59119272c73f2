"""How many tokens' keys and values a server may keep, so that requests wait or are refused before memory runs out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from luban.core.errors import ConfigError, DataError
from luban.core.units import bytes_
from luban.generate.cache import float_parameter
from luban.generate.paged_cache import BLOCK_SIZE
from luban.generate.sampler import sample
from luban.generate.sampling import Sampling
from luban.models.base import Model
from luban.parallel.memory_limits import free_memory
from luban.serve.backend import PagedBackend
from luban.serve.model_runner import ModelRunner
from luban.serve.scheduler import Chunk, SequenceState

SHARE = 0.5  # of the free memory; the rest is for prompts while they are read, and for caches while they are joined
SCALE_BYTES = 4  # of a head's numbers in 8 bits
WARM_SHARE = 0.9  # of what is free beside a measured forward; the rest is for pieces of memory that nothing fits


class RequestTooLarge(DataError):
    """A request whose keys and values would never fit."""


@dataclass(frozen=True)
class CacheBudget:
    """The limit of a cache of keys and values."""

    slots: int  # tokens over all sequences
    slot_bytes: int  # of one token's keys and values over all layers
    context: int  # tokens of the longest sequence that the model takes

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Slots that a sequence needs at most."""
        return min(len(prompt) + max_tokens, max(self.context, len(prompt)))

    def holds(self, lengths: Iterable[int]) -> bool:
        """Whether sequences of these lengths fit together."""
        raise NotImplementedError

    def together(self, n: int) -> int:
        """How many of `n` continuations of one prompt must fit together; of a beam search all must (`require`)."""
        raise NotImplementedError

    def longest_answer(self, prompt: Sequence[int], n: int) -> int:
        """Tokens that each of `n` answers to a prompt may have; at least 1."""
        return max(1, min(self.context, self.slots // self.together(n)) - len(prompt))

    def require(self, prompt: Sequence[int], sampling: Sampling) -> None:
        """Raise RequestTooLarge where a request wouldn't fit even alone."""
        longest = self.tokens(prompt, sampling.max_tokens)
        n = self.together(sampling.n) if sampling.beams == 1 else sampling.beams
        if not self.holds([longest] * n):
            asked, fewer = (f"{n} × {longest}", "fewer answers (n) or beams, ") if n > 1 else (str(longest), "")
            raise RequestTooLarge(
                f"{asked} tokens (the prompt and max_tokens) need {bytes_(n * longest * self.slot_bytes)} of keys and "
                f"values, and {bytes_(self.slots * self.slot_bytes)} are available: ask for {fewer}a smaller max_tokens or "
                "a shorter prompt"
            )


@dataclass(frozen=True)
class ContiguousBudget(CacheBudget):
    """A contiguous cache holds as many slots for every sequence as for the longest."""

    @classmethod
    def of(cls, model: Model, cache_bytes: int | None = None) -> ContiguousBudget:
        """For a loaded model.

        Args:
            cache_bytes: for keys and values of all sequences; None: half of what the device has free.
        """
        size, sides = slot_bytes(model), 2 if model.spec.body.two_sided else 1  # keys and values of the source too
        total = int(SHARE * free_memory(float_parameter(model).device)) if cache_bytes is None else cache_bytes
        return cls(total // (sides * size), sides * size, model.spec.context)

    def holds(self, lengths: Iterable[int]) -> bool:
        """Padding included."""
        lengths = list(lengths)
        return len(lengths) * max(lengths, default=0) <= self.slots

    def together(self, n: int) -> int:
        """All: they run in one batch to their ends."""
        return n


@dataclass(frozen=True)
class PagedBudget(CacheBudget):
    """A pool of blocks. Continuations of a prompt need not fit together: those that don't are read again later."""

    block_size: int = BLOCK_SIZE
    two_sided: bool = False  # whether a prompt is an encoder's source, in blocks of its own

    @classmethod
    def of(
        cls,
        model: Model,
        cache_bytes: int | None = None,
        *,
        block_size: int = BLOCK_SIZE,
        max_sequences: int,
        max_tokens: int,
        draft: Model | None = None,
        recorded: bool = False,
        backend: PagedBackend | None = None,
        share: float = SHARE,
    ) -> PagedBudget:
        """For a loaded model.

        Args:
            cache_bytes: for keys and values. None: of what the device has free half, or on CUDA nearly all that a forward
                of `max_tokens` leaves, which is run here; and no more than `max_sequences` could ever use.
            draft: a model with keys and values of its own for every slot.
            recorded: forwards will be, and keep memory of their own.
            backend: of attention; None: of all heads.
            share: of a host's free memory.

        Raises ConfigError for `cache_bytes` that hold no block.
        """
        backend = backend or PagedBackend()
        size = slot_bytes(model, backend) + (0 if draft is None else slot_bytes(draft))
        context = model.spec.context
        if cache_bytes is not None and cache_bytes < size * block_size:
            raise ConfigError(
                f"{bytes_(cache_bytes)} for keys and values hold no block of {block_size} tokens, which takes "
                f"{bytes_(size * block_size)}: give a larger --cache-gb (cache_bytes)"
            )
        if cache_bytes is None:
            device = float_parameter(model).device
            if device.type == "cuda":
                times = 1 + recorded
                cache_bytes = free_beside_a_forward(model, block_size, max_sequences, max_tokens, times, backend)
            else:
                cache_bytes = int(share * free_memory(device))
            cache_bytes = min(cache_bytes, max_sequences * size * -(-context // block_size) * block_size)
        blocks = max(1, cache_bytes // (size * block_size))
        return cls(blocks * block_size, size, context, block_size, model.spec.body.two_sided)

    def tokens(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Slots that a sequence needs at most; of an encoder–decoder the source's whole blocks, and the decoder's tokens."""
        if not self.two_sided:
            return super().tokens(prompt, max_tokens)
        return self._source_slots(prompt) + min(1 + max_tokens, self.context)

    def _source_slots(self, prompt: Sequence[int]) -> int:
        return -(-len(prompt) // self.block_size) * self.block_size

    def longest_answer(self, prompt: Sequence[int], n: int) -> int:
        """Tokens that each of `n` answers to a prompt may have; at least 1."""
        if not self.two_sided:
            return super().longest_answer(prompt, n)
        return max(1, min(self.context, self.slots - self._source_slots(prompt)) - 1)

    def holds(self, lengths: Iterable[int]) -> bool:
        """In whole blocks, of which the pool is made."""
        return sum(lengths) <= self.slots

    def together(self, n: int) -> int:
        """One alone: then all end in turn."""
        return 1


def slot_bytes(model: Model, backend: PagedBackend | None = None) -> int:
    """What all layers keep of one token: keys and values, and the states of other mixers. `backend`: whose heads; None: all."""
    mixers, backend = [layer.mixer for layer in model.spec.layers], backend or PagedBackend()
    each = float_parameter(model).element_size()
    heads = [(2 * shape.key_heads, shape.head_dim) for shape in backend.shapes(model) if shape is not None]
    kept = sum(count * (width * each if backend.kept is None else width + SCALE_BYTES) for count, width in heads)
    states = [state for mixer in mixers for state in mixer.state_spec(model.spec.width) if state.last is None]
    numbers = sum(state.width for state in states if not state.integer)
    wide = 8 * sum(state.width for state in states if state.integer)
    return max(kept + numbers * each + wide, 1)


def free_beside_a_forward(
    model: Model, block_size: int, max_sequences: int, max_tokens: int, times: int, backend: PagedBackend
) -> int:
    """Bytes of a CUDA device that the largest step leaves, with its memory taken so many times: `max_tokens` of prompts read, and tokens drawn for
    `max_sequences` by all filters. Kernels are compiled by the way, those for few and for many single tokens too."""
    device = float_parameter(model).device
    each = min(max_tokens, model.spec.context)
    blocks, count = -(-each // block_size), max(1, max_tokens // each)
    torch.cuda.empty_cache()
    cache = backend.cache(model, blocks=blocks * count, block_size=block_size)
    runner = ModelRunner(model, cache, backend=backend)
    tables = [list(range(i * blocks, (i + 1) * blocks)) for i in range(count)]
    states = [SequenceState([0] * each, (i, 0), table=table) for i, table in enumerate(tables)]
    if model.spec.body.two_sided:
        for state, table in zip(states, tables, strict=True):
            state.source, state.source_table = [0] * each, table
    for singles in (1, max_sequences):
        runner.run([Chunk(states[0], each - 1, 1)] * singles)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    logits = runner.run([Chunk(state, 0, each) for state in states])
    sampling = [Sampling(temperature=1.0, top_p=0.9, top_k=50)] * max_sequences
    sample(logits[:1].expand(max_sequences, -1).contiguous(), sampling, [0.5] * max_sequences).tolist()
    used = torch.cuda.max_memory_allocated(device) - before
    del runner, cache, logits
    torch.cuda.empty_cache()
    return max(0, int(WARM_SHARE * (free_memory(device) - times * used)))
