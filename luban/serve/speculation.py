"""Speculative decoding: several tokens are guessed, the model reads them in one forward, and those that it would have
chosen itself are kept (Leviathan et al. 2023).

Which token comes at a position depends on the model's logits there and on a draw that is a function of the request's seed
and the position (`luban.generate.sampler`). So a guess is kept where it is the very token that comes, and text, seeds and
distributions are exactly those without speculation; what differs from the paper is that a guess from a similar
distribution is kept only as often as the same draw leads to the same token in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.generate.paged_cache import PagedCache, paging_refusal
from luban.generate.session import Chosen, choose
from luban.generate.session import Sequence as Growing
from luban.models.base import Model
from luban.serve.model_runner import ModelRunner
from luban.serve.scheduler import Chunk, SequenceState

DRAFT_TOKENS = 4  # guessed at once
LONGEST, SHORTEST = 4, 2  # tokens of the ends that are looked up
Asked = Sequence[tuple[SequenceState, Growing, int]]  # a sequence, as it grows, and how many tokens to guess at most


class Proposer(Protocol):
    """What guesses."""

    def propose(self, asked: Asked) -> None:
        """Set `draft` of each state."""
        ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Blocks of the pool are copied, (source, copy) each."""
        ...

    def forget(self, state: SequenceState) -> None:
        """A sequence has ended."""
        ...


class NgramProposer:
    """Guesses what followed the same tokens before, in the prompt or the answer (prompt lookup decoding, Saxena 2023)."""

    def __init__(self) -> None:
        self._ends: dict[SequenceState, dict[tuple[int, ...], int]] = {}  # an n-gram → where its last occurrence ends
        self._read: dict[SequenceState, int] = {}  # tokens entered

    def propose(self, asked: Asked) -> None:
        """The tokens after the latest occurrence of the longest end that occurred before."""
        for state, _, most in asked:
            state.draft = self._guess(state, most)

    def _guess(self, state: SequenceState, most: int) -> list[int]:
        tokens, ends = state.tokens, self._ends.setdefault(state, {})
        self._enter(state, len(tokens) - 1)  # all n-grams but those at the very end
        found = None
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            found = ends.get(tuple(tokens[-size:]))
            if found is not None:
                break
        return tokens[found : found + most] if found is not None else []

    def _enter(self, state: SequenceState, stop: int) -> None:
        """Note the n-grams that end at token `stop` or before."""
        tokens, ends = state.tokens, self._ends[state]
        for end in range(max(self._read.get(state, 0), SHORTEST), stop + 1):
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                ends[tuple(tokens[end - size : end])] = end
        self._read[state] = stop + 1

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Nothing is kept in blocks."""

    def forget(self, state: SequenceState) -> None:
        """Drop its n-grams."""
        self._ends.pop(state, None)
        self._read.pop(state, None)


class DraftProposer:
    """Guesses with a smaller model of the same vocabulary, whose keys and values stand in blocks of the same numbers.

    Whatever stands there, right or not, only changes how many guesses are kept.

    Args:
        module: UnsupportedError where its vocabulary has another size than the model's, or it can't be paged.
        vocab_size: of the model.
        blocks, block_size: of the model's pool.
        max_tokens: that a forward reads.
        kernel: of attention.
    """

    def __init__(
        self, module: Model, *, vocab_size: int, blocks: int, block_size: int, max_tokens: int, kernel: str | None
    ):
        if module.spec.vocab_size != vocab_size:
            raise UnsupportedError(
                f"the draft model's vocabulary has {module.spec.vocab_size} tokens, the model's {vocab_size}: both must "
                "have the same"
            )
        if module.spec.body.two_sided:
            raise UnsupportedError("an encoder–decoder can't guess tokens for another model")
        if refusal := paging_refusal(module):
            raise UnsupportedError(f"the draft model can't keep keys and values in blocks: {refusal}")
        self.runner = ModelRunner(module, PagedCache.of(module, blocks=blocks, block_size=block_size), kernel)
        self.max_tokens = max_tokens
        self._read: dict[SequenceState, tuple[int, int]] = {}  # admissions, and tokens of which it has keys and values

    def propose(self, asked: Asked) -> None:
        """The tokens that the draft model would choose, by the sequences' own settings and draws."""
        context, probes = self.runner.module.spec.context, {}
        for state, growing, most in asked:
            state.draft = []
            if most and len(state.tokens) + most <= context:
                matcher = growing.matcher and growing.matcher.copy()
                sampling = replace(growing.sampling, logprobs=None, prompt_logprobs=None)
                probe = replace(growing, sampling=sampling, tokens=list(growing.tokens), logprobs=[], matcher=matcher)
                probes[state] = probe, most
        while probes:
            logits_RV = self._catch_up(list(probes))
            chosen = choose(logits_RV, [probe for probe, _ in probes.values()], lambda s: s.prompt + s.tokens)
            for state, token in zip(list(probes), chosen, strict=True):
                if isinstance(token, int):
                    state.draft.append(token)
                if not isinstance(token, int) or len(state.draft) == probes[state][1]:
                    del probes[state]

    def _catch_up(self, states: Sequence[SequenceState]) -> Tensor:
        """Read what the draft model hasn't read of these sequences; (R, V) logits of what follows each."""
        rows: dict[SequenceState, Tensor] = {}
        while missing := [state for state in states if state not in rows]:
            chunks, budget = [], self.max_tokens
            for state in missing:
                start, whole = self._start(state), len(state.tokens) + len(state.draft)
                if budget:
                    chunks.append(Chunk(state, start, min(whole - start, budget)))
                    budget -= chunks[-1].count
            logits = iter(self.runner.run(chunks).clone())
            for chunk in chunks:
                self._read[chunk.state] = chunk.state.admissions, chunk.start + chunk.count
                if chunk.last:
                    rows[chunk.state] = next(logits)
        return torch.stack([rows[state] for state in states])

    def _start(self, state: SequenceState) -> int:
        """The first token that isn't read: guesses that weren't kept are no tokens, and blocks given up hold nothing."""
        admissions, count = self._read.get(state, (0, 0))
        if admissions != state.admissions:
            return 0
        return min(count, len(state.tokens) + len(state.draft) - 1, state.agreed if not state.draft else count)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy them in the draft model's pool."""
        self.runner.cache.copy(pairs)

    def forget(self, state: SequenceState) -> None:
        """Its blocks go with the model's."""
        self._read.pop(state, None)


def verify(
    logits_RV: Tensor,
    growing: Sequence[Growing],
    drafts: Sequence[Sequence[int]],
    seen: Callable[[Growing], list[int]],
) -> list[list[Chosen]]:
    """Append to every sequence the tokens that come: its guesses as far as they are the tokens chosen, and one more.

    Args:
        logits_RV: of each sequence in turn, the token after it and after each of its guesses.
        drafts: the guesses.
        seen: the tokens that a penalty on repetition counts.
    """
    if not any(drafts):
        return [[token] for token in choose(logits_RV, growing, seen)]
    probes: list[Growing] = []
    for sequence, draft in zip(growing, drafts, strict=True):
        matcher = sequence.matcher
        for size in range(len(draft) + 1):
            if size and matcher is not None:
                matcher = matcher.copy()
                if not matcher.consume(draft[size - 1]):
                    matcher = None  # the guess isn't allowed, so that what follows it is never looked at
            own = matcher and matcher.copy()
            probes.append(replace(sequence, tokens=[*sequence.tokens, *draft[:size]], logprobs=[], matcher=own))
    chosen, first = choose(logits_RV, probes, seen), 0
    found: list[list[Chosen]] = []
    for sequence, draft in zip(growing, drafts, strict=True):
        kept: list[Chosen] = []
        for size in range(len(draft) + 1):
            probe, token = probes[first + size], chosen[first + size]
            kept.append(token)
            sequence.tokens.append(probe.tokens[-1])
            sequence.logprobs += probe.logprobs
            sequence.matcher = probe.matcher
            whole = probe.matcher is not None and probe.matcher.finished
            if size == len(draft) or token != draft[size] or whole:
                break
        found.append(kept)
        first += len(draft) + 1
    return found
