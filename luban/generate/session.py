"""A batch of sequences that grow together, one token each a step; sequences may join and leave between steps.

Results don't depend on who shares the batch: every draw is a function of the request's seed, its continuation
and its step (rounding of the logits aside, which a batch of another shape may change in the last bits).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from luban.generate.cache import ContextError, ContiguousCache
from luban.generate.sampler import penalised, sample, uniform
from luban.generate.sampling import Sampling
from luban.models.body import require_next_token
from luban.models.spec import ModelSpec


@dataclass
class TokenLogprob:
    """The model's own log-probability of a token, before temperature and filters."""

    token: int
    logprob: float  # nats
    top: list[tuple[int, float]]  # the likeliest tokens with theirs, likeliest first


@dataclass(eq=False)
class Sequence:
    """One continuation in the making."""

    prompt: list[int]  # token ids, at least one
    sampling: Sampling
    seed: int  # of its draws
    choice: int = 0  # which of the request's n continuations
    tokens: list[int] = field(default_factory=list)  # generated so far
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of each, where asked for

    def __len__(self) -> int:
        return len(self.prompt) + len(self.tokens)


class Session:
    """Runs a decoder over sequences with a contiguous cache.

    Args:
        module: a causal decoder; it is called in inference mode. UnsupportedError for any other.
    """

    def __init__(self, module: nn.Module):
        self.module = module.eval()
        self.spec: ModelSpec = module.spec
        self.require(self.spec)
        self.sequences: list[Sequence] = []
        self.cache: ContiguousCache | None = None
        self.logits: Tensor | None = None  # (B, V) float32, of each sequence's next token

    def require(self, spec: ModelSpec) -> None:
        """Raise UnsupportedError unless this model predicts the next token step by step."""
        require_next_token(spec, "generating text", cached=True)

    def check(self, prompt: list[int]) -> None:
        """Raise ContextError where a prompt is empty, too long, or holds ids outside the vocabulary."""
        check_ids(prompt, self.spec)
        if len(prompt) >= self.spec.context:
            raise ContextError(f"the prompt has {len(prompt)} tokens, and the model's context of {self.spec.context} "
                               "must also hold the answer: shorten the prompt")  # fmt: skip

    def full(self, sequence: Sequence) -> bool:
        """Whether the context has no room for another token."""
        return len(sequence) >= self.spec.context

    @torch.inference_mode()
    def add(self, sequences: SequenceOf[Sequence]) -> None:
        """Read the prompts of new sequences; equal prompt objects are read once.

        Raises ContextError, before anything is read, when a prompt leaves no room for a token.
        """
        for sequence in sequences:
            self.check(sequence.prompt)
        if not sequences:
            return
        prompts = {id(s.prompt): s.prompt for s in sequences}
        cache, logits = self._prefill(list(prompts.values()))
        rows = [list(prompts).index(id(s.prompt)) for s in sequences]
        if rows != list(range(len(prompts))):
            cache.select(rows)
            logits = logits[rows]
        if self.cache is None:
            self.cache, self.logits = cache, logits
        else:
            self.cache.join(cache)
            self.logits = torch.cat((self.logits, logits))
        self.sequences.extend(sequences)

    def _prefill(self, prompts: list[list[int]]) -> tuple[ContiguousCache, Tensor]:
        tokens, mask = self._padded(prompts)
        cache = ContiguousCache(**self._cache_shape(len(prompts)))
        return cache, self._next_logits(tokens, mask, cache)

    def _cache_shape(self, batch: int) -> dict[str, Any]:
        weight, attention = next(self.module.parameters()), self.spec.attention
        return {"layers": self.spec.layers, "key_heads": attention.key_heads(), "batch": batch,
                "head_dim": attention.head_width(self.spec.width), "context": self.spec.context,
                "device": weight.device, "dtype": weight.dtype}  # fmt: skip

    def _padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor | None]:
        """(B, T) tokens padded on the left, and which are real (None: all)."""
        device, longest = next(self.module.parameters()).device, max(map(len, prompts))
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        if all(len(p) == longest for p in prompts):
            return tokens, None
        room = torch.tensor([longest - len(p) for p in prompts], device=device)
        return tokens, torch.arange(longest, device=device) >= room[:, None]

    def _next_logits(self, tokens: Tensor, mask: Tensor | None, cache: ContiguousCache) -> Tensor:
        hidden = self.module(tokens, mask, cache=cache, output="hidden")
        return self.module.head(hidden[:, -1]).float()

    @torch.inference_mode()
    def choose(self) -> list[int]:
        """Append one token to every sequence; returns the tokens in the order of `sequences`."""
        rows = self._penalised()
        greedy = rows.argmax(-1).tolist()
        rows = rows.cpu() if any(s.sampling.temperature for s in self.sequences) else rows
        for row, (sequence, best) in enumerate(zip(self.sequences, greedy, strict=True)):
            sampling, token = sequence.sampling, best
            if sampling.temperature:
                token = sample(rows[row], sampling, uniform(sequence.seed, sequence.choice, len(sequence.tokens)))
            if sampling.logprobs is not None:
                sequence.logprobs.append(token_logprob(self.logits[row], token, sampling.logprobs))
            sequence.tokens.append(token)
        return [sequence.tokens[-1] for sequence in self.sequences]

    def seen(self, sequence: Sequence) -> list[int]:
        """The tokens that a penalty on repetition counts."""
        return sequence.prompt + sequence.tokens

    def _penalised(self) -> Tensor:
        """(B, V) logits, lowered for what each sequence has seen, where it asks for that."""
        if all(s.sampling.repetition_penalty == 1 for s in self.sequences):
            return self.logits
        return torch.stack([
            row if s.sampling.repetition_penalty == 1 else penalised(row, self.seen(s), s.sampling.repetition_penalty)
            for row, s in zip(self.logits, self.sequences, strict=True)
        ])  # fmt: skip

    @torch.inference_mode()
    def advance(self, going_on: SequenceOf[Sequence]) -> None:
        """Drop the sequences that are not in `going_on` and read the last token of those that are."""
        rows = [row for row, sequence in enumerate(self.sequences) if sequence in going_on]
        if len(rows) != len(self.sequences):
            self.sequences = [self.sequences[row] for row in rows]
            self.cache.select(rows)
        if not self.sequences:
            self.cache = self.logits = None
            return
        tokens = torch.tensor([[s.tokens[-1]] for s in self.sequences], device=self.logits.device)
        self.logits = self._next_logits(tokens, None, self.cache)


def check_ids(prompt: list[int], spec: ModelSpec) -> None:
    """Raise ContextError where a prompt is empty or holds ids outside the vocabulary."""
    if not prompt:
        raise ContextError("the prompt is empty: at least one token is needed")
    if not 0 <= min(prompt) <= max(prompt) < spec.vocab_size:
        raise ContextError(f"the prompt holds token ids outside the model's vocabulary of {spec.vocab_size}")


def token_logprob(logits_V: Tensor, token: int, alternatives: int) -> TokenLogprob:
    """The log-probability of `token`, and of the likeliest `alternatives`."""
    logprobs = logits_V.float().log_softmax(-1)
    values, ids = logprobs.topk(min(alternatives, logprobs.numel()))
    return TokenLogprob(token, float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True)))
