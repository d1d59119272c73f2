"""A request to the engine and what it answers with."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from luban.core.seeding import derive
from luban.generate.sampling import Sampling
from luban.generate.session import Sequence as Growing
from luban.generate.session import TokenLogprob
from luban.generate.text import TextStream
from luban.generate.token_mask import Matcher

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to one continuation."""

    choice: int  # which of the n
    text: str  # may be empty while a character or a stop string is undecided
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason | None  # set on the last delta of a continuation


@dataclass
class Choice:
    """One finished continuation."""

    text: str = ""  # without the end token and without a stop string
    token_ids: list[int] = field(default_factory=list)  # as generated, the end token included
    logprobs: list[TokenLogprob] | None = None  # one a token, where asked for
    score: float | None = None  # of an answer of a beam search (`luban.generate.beam`)
    finish_reason: FinishReason | None = None  # stop: an end token or a stop string; length: max_tokens or the context


@dataclass
class Result:
    """The continuations of one prompt; `text` and the rest speak of the first."""

    prompt_token_ids: list[int]
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprob | None] | None = None  # one a token, none for the first; where asked for

    @property
    def text(self) -> str:
        """Text of the first continuation."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """Its tokens, the end token included."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """Its log-probabilities, where asked for."""
        return self.choices[0].logprobs


class Request:
    """A prompt on its way. `deltas` are handed to `listener` as they come, and collected in `result`.

    Args:
        ends: tokens that end the text, which `min_tokens` holds back.
        matcher: of the request's structure, at its beginning.
        priority: requests with smaller numbers are served first, and give up their memory last.
        kept: special tokens that belong to the text.
        continues: whether the generated text continues the prompt's, so that a space between them belongs to it.
        identity: what keys and values depend on beside the tokens (an adapter); prompts share them where it is the same.
    """

    def __init__(
        self,
        prompt: list[int],
        sampling: Sampling,
        listener: Callable[[Delta], None] | None = None,
        *,
        ends: tuple[int, ...] = (),
        matcher: Matcher | None = None,
        priority: int = 0,
        kept: frozenset[int] = frozenset(),
        continues: bool = False,
        identity: str = "",
    ):
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.prompt, self.sampling, self.listener, self.continues = prompt, sampling, listener, continues
        self.identity, self.priority, self.kept = identity, priority, kept
        self.adapter = ""  # key of the adapter that the engine gives it (`luban.serve.adapters`); empty: none
        seed = derive(seed, "request")
        self.growing = [
            Growing(prompt, sampling, seed, choice, ends, None if matcher is None else matcher.copy())
            for choice in range(sampling.n if sampling.beams == 1 else 1)  # one stands for a whole beam search
        ]
        empty = None if sampling.logprobs is None else []
        self.result = Result(prompt, [Choice(logprobs=None if empty is None else []) for _ in range(sampling.n)])
        self.cancelled = False
        self.error: Exception | None = None  # what broke the request, if anything did

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were found in the prefix cache when the request was first taken up."""
        return self.growing[0].cached_tokens

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return all(choice.finish_reason for choice in self.result.choices)

    def cancel(self) -> None:
        """Stop generating at the next step; safe from any thread."""
        self.cancelled = True


class News(NamedTuple):
    """A token that a request is still to be told of."""

    growing: Growing
    request: Request
    text: TextStream | None
    token: int
    ends: bool  # whether it is an end token, which has no text
    finish_reason: FinishReason | None


class Running(NamedTuple):
    """A continuation that the batch was given."""

    growing: Growing
    request: Request
    text: TextStream | None  # None: the model has no tokenizer
