"""Sequences over a contiguous cache: for models whose keys and values can't be kept in pages (encoder–decoders, positions
by the length of the row), and as the slow twin of `luban.serve.paged`. The cache is copied whenever sequences join or
leave."""

from __future__ import annotations

from collections.abc import Sequence

from luban.generate.prompt_scores import prompt_logprobs
from luban.generate.session import Sequence as Growing
from luban.generate.source import session_for
from luban.models.base import Model
from luban.serve.batch import BatchLoad, Token
from luban.serve.memory import ContiguousBudget
from luban.serve.request import Request

MAX_BATCH = 32  # sequences that grow together
MAX_PREFILL = 16_384  # tokens, padding included, of prompts that are read together


class ContiguousBatch:
    """See `luban.serve.batch.Batch`.

    Args:
        module: that writes text. UnsupportedError for any other.
        max_batch: sequences that grow together; None: 32.
        cache_bytes: for keys and values; None: half of what the device has free.
    """

    def __init__(self, module: Model, *, max_batch: int | None = None, cache_bytes: int | None = None):
        self.module, self.session = module, session_for(module)
        self.max_batch = max_batch or MAX_BATCH
        self.budget = ContiguousBudget.of(module, cache_bytes)

    @property
    def sequences(self) -> Sequence[Growing]:
        """Those that run."""
        return self.session.sequences

    def check(self, prompt: list[int]) -> None:
        """As the session."""
        self.session.check(prompt)

    def full(self, sequence: Growing) -> bool:
        """As the session."""
        return self.session.full(sequence)

    def takes(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether there is room: by number, by memory once all have grown to their end, and by the tokens of prompts that
        are read in one step. A request larger than the batch runs alone."""
        running = [*self.sequences, *(growing for other in others for growing in other.growing)]
        if not running:
            return True
        if len(running) + len(request.growing) > self.max_batch:
            return False
        if others:
            prompts = [len(other.prompt) for other in (*others, request)]
            if len(prompts) * max(prompts) > MAX_PREFILL:
                return False
        grown = [self.budget.tokens(g.prompt, g.sampling.max_tokens) for g in (*running, *request.growing)]
        return self.budget.holds(grown)

    def start(self, requests: list[Request]) -> list[tuple[Request, Exception]]:
        """Read the prompts together; where that fails one by one, so that none fails for another's sake."""
        try:
            for request in requests:
                self.budget.require(request.prompt, request.sampling.max_tokens, request.sampling.n)
            self.session.add([growing for request in requests for growing in request.growing])
            for growing in (growing for request in requests for growing in request.growing):
                if growing.sampling.prompt_logprobs is not None and growing.choice == 0:
                    growing.prompt_logprobs = prompt_logprobs(
                        self.module, growing.prompt, growing.sampling.prompt_logprobs
                    )
        except Exception as error:
            if len(requests) == 1:
                return [(requests[0], error)]
            return [failed for request in requests for failed in self.start([request])]
        return []

    def next_tokens(self) -> list[tuple[Growing, Token]]:
        """One for every sequence."""
        if not self.session.sequences:
            return []
        return list(zip(self.session.sequences, self.session.choose(), strict=True))

    def go_on(self, ended: list[Growing]) -> None:
        """Read the last tokens of those that haven't ended."""
        self.session.advance([sequence for sequence in self.session.sequences if sequence not in ended])

    def leave(self, sequences: list[Growing]) -> None:
        """Drop their rows."""
        self.session.keep([sequence for sequence in self.session.sequences if sequence not in sequences])

    def load(self) -> BatchLoad:
        """Slots are held by the longest sequence's length."""
        sequences = self.sequences
        held = len(sequences) * max(map(len, sequences), default=0)
        return BatchLoad(len(sequences), 0, min(1.0, held / max(1, self.budget.slots)))

    def clear(self) -> None:
        """Drop all rows."""
        self.session.keep([])
