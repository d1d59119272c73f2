"""Sequences over a contiguous cache: for models whose keys and values can't be kept in pages (positions by the length of the
row, mixers with other states: `luban.generate.paged_cache.paging_refusal`), and as the slow twin of `luban.serve.paged`. The
cache is copied whenever sequences join or leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from luban.generate.beam import BeamSearch
from luban.generate.prompt_scores import prompt_logprobs
from luban.generate.session import Sequence as Growing
from luban.generate.session import beam_candidates, choose
from luban.generate.source import session_for
from luban.models.base import Model
from luban.serve.batch import BatchLoad, LostProcess, Token
from luban.serve.beam_group import grown, search_for
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
        self._searches: dict[int, tuple[Growing, BeamSearch]] = {}  # by id of the sequence that stands for a search
        self._owner: dict[int, Growing] = {}  # id of a hypothesis → the sequence that stands for its search

    @property
    def sequences(self) -> Sequence[Growing]:
        """Those that run."""
        return self.session.sequences

    def check(self, prompt: list[int]) -> None:
        """As the session."""
        self.session.prompts.check(prompt)

    def max_new_tokens(self, prompt: list[int]) -> int:
        """As the session."""
        return self.session.prompts.max_new_tokens(prompt)

    def takes(self, request: Request, others: Sequence[Request]) -> bool:
        """Whether it fits: by number, by memory once all have grown to their end, and by the tokens of prompts that
        are read in one step. A request larger than the batch runs alone."""
        running = [*self.sequences, *(growing for other in others for growing in other.growing)]
        if not running:
            return True
        if sum(self._rows(growing) for growing in (*running, *request.growing)) > self.max_batch:
            return False
        if others:
            prompts = [len(other.prompt) for other in (*others, request)]
            if len(prompts) * max(prompts) > MAX_PREFILL:
                return False
        lengths = [
            self.budget.tokens(g.prompt, g.sampling.max_tokens)
            for g in (*running, *request.growing)
            for _ in range(self._rows(g))
        ]
        return self.budget.holds(lengths)

    def _rows(self, growing: Growing) -> int:
        """Rows that a sequence will need: its own, or as the first of a beam search those of all its hypotheses."""
        return 1 if growing.tokens else growing.sampling.beams

    def start(self, requests: list[Request]) -> list[tuple[Request, Exception]]:
        """Read the prompts together; where that fails one by one, so that none fails for another's sake."""
        try:
            for request in requests:
                self.budget.require(request.prompt, request.sampling)
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

    def next_tokens(self, meanwhile: Callable[[], None]) -> list[tuple[Growing, list[Token]]]:
        """One for every sequence; beam searches go on by one."""
        meanwhile()
        return [(growing, [token]) for growing, token in self._next_tokens()]

    def _next_tokens(self) -> list[tuple[Growing, Token]]:
        """One for every sequence; beam searches go on by one."""
        sequences = list(self.session.sequences)
        if not sequences:
            return []
        for growing in sequences:
            if growing.sampling.beams > 1 and id(growing) not in self._searches and id(growing) not in self._owner:
                self._searches[id(growing)] = (
                    growing,
                    search_for(growing, self.session.prompts.max_new_tokens(growing.prompt)),
                )
                self._owner[id(growing)] = growing
        if not self._searches:
            return list(zip(sequences, self.session.choose(), strict=True))
        logits_BV = self.session.logits
        assert logits_BV is not None
        plain = [row for row, growing in enumerate(sequences) if id(growing) not in self._owner]
        found: list[tuple[Growing, Token]] = []
        if plain:
            chosen = [sequences[row] for row in plain]
            found += zip(chosen, choose(logits_BV[plain], chosen, self.session.prompts.seen), strict=True)
        rows, kept = plain, [sequences[row] for row in plain]
        for owner, search in self._searches.values():
            mine = [row for row, growing in enumerate(sequences) if self._owner.get(id(growing)) is owner]
            hypotheses = [sequences[row] for row in mine]
            candidates = beam_candidates(logits_BV[mine], hypotheses, self.session.prompts.seen, search.wanted)
            for hypothesis in hypotheses:
                del self._owner[id(hypothesis)]
            moves = [] if None in candidates else search.advance([following or [] for following in candidates])
            children = grown(hypotheses, moves)
            self._owner |= {id(child): owner for child in children}
            rows, kept = [*rows, *(mine[index] for index, _ in moves)], [*kept, *children]
            if not moves:
                found.append((owner, None if None in candidates else search.result()))
        self.session.replace(rows, kept)
        return found

    def go_on(self, ended: list[Growing]) -> None:
        """Read the last tokens of those that haven't ended."""
        self.session.advance(self._without(ended))

    def leave(self, sequences: list[Growing]) -> None:
        """Drop their rows."""
        self.session.keep(self._without(sequences))

    def _without(self, gone: list[Growing]) -> list[Growing]:
        """Rows of others than these sequences and searches."""
        for growing in gone:
            self._searches.pop(id(growing), None)
        dropped = {id(growing) for growing in gone}
        kept = [each for each in self.sequences if id(self._owner.get(id(each), each)) not in dropped]
        alive = {id(each) for each in kept}
        self._owner = {key: owner for key, owner in self._owner.items() if key in alive}
        return kept

    def weights_changed(self) -> None:
        """Nothing is kept between sequences."""

    def load(self) -> BatchLoad:
        """Slots are held by the longest sequence's length."""
        sequences = self.sequences
        held = len(sequences) * max(map(len, sequences), default=0)
        return BatchLoad(len(sequences), 0, min(1.0, held / max(1, self.budget.slots)))

    def clear(self) -> None:
        """Drop all rows."""
        self._searches.clear()
        self._owner.clear()
        self.session.keep([])

    def watch(self, watcher: Callable[[LostProcess], None]) -> None:
        """No other process is needed."""

    def close(self) -> None:
        """Nothing was started."""
