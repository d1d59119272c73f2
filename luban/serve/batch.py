"""What the engine asks of the sequences that run together, whatever keeps their keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from luban.core.errors import LubanError
from luban.generate.beam import Answers
from luban.generate.session import Sequence as Growing
from luban.serve.memory import CacheBudget
from luban.serve.request import Request

# None: logits from which no token can be chosen; an error: reading the sequence failed; answers: its beam search has ended
Token = int | None | Exception | Answers


class LostProcess(LubanError):
    """One of the processes that hold a model together is gone, and with it the model."""


@dataclass(frozen=True)
class BatchLoad:
    """What a batch holds at a moment, and what it has counted since it began."""

    running: int  # sequences
    waiting: int  # sequences, or requests, without memory
    cache_usage: float  # share of the cache that sequences hold
    prompt_tokens: int = 0  # that were looked up in the prefix cache …
    prefix_hits: int = 0  # … and of them found there
    preemptions: int = 0
    swaps: int = 0  # preemptions whose keys and values were kept in host memory
    drafted: int = 0  # tokens guessed by speculation …
    accepted: int = 0  # … and of them kept


class Batch(Protocol):
    """Sequences that grow together; they join and leave between steps."""

    @property
    def budget(self) -> CacheBudget:
        """What the cache holds."""
        ...

    @property
    def sequences(self) -> Sequence[Growing]:
        """Those that run."""
        ...

    def check(self, prompt: list[int]) -> None:
        """Raise ContextError where a prompt is empty, too long, or holds ids outside the vocabulary."""
        ...

    def max_new_tokens(self, prompt: list[int]) -> int:
        """Tokens of an answer that the context holds."""
        ...

    def takes(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether a request may be started beside what runs and these others."""
        ...

    def start(self, requests: list[Request]) -> list[tuple[Request, Exception]]:
        """Take requests up; returns those that failed alone, with what broke them."""
        ...

    def next_tokens(self, meanwhile: Callable[[], None]) -> list[tuple[Growing, list[Token]]]:
        """Append a token, or several, to sequences that are ready for one. Those behind a token that ends its text are of
        no meaning.

        Args:
            meanwhile: called once, as soon as the device has work.
        """
        ...

    def go_on(self, ended: list[Growing]) -> None:
        """Forget these sequences, of those that `next_tokens` returned, and go on with the others."""
        ...

    def leave(self, sequences: list[Growing]) -> None:
        """Forget these sequences, whatever they are doing; what they held is free at once."""
        ...

    def weights_changed(self) -> None:
        """Drop what was computed with weights that were changed in place; no sequence is running."""
        ...

    def load(self) -> BatchLoad:
        """What it holds; from any thread."""
        ...

    def clear(self) -> None:
        """Forget all."""
        ...

    def watch(self, watcher: Callable[[LostProcess], None]) -> None:
        """Call `watcher`, from another thread, when a process is gone that it needs."""
        ...

    def close(self) -> None:
        """End what was started for it."""
        ...
