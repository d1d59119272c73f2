"""Sequences over a paged KV cache: the scheduler says what the next forward reads, the runner reads it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from luban.core.errors import UnsupportedError
from luban.generate.paged_cache import BLOCK_SIZE
from luban.generate.prompt_scores import scored
from luban.generate.prompts import prompts_of
from luban.generate.session import Sequence as Growing
from luban.generate.session import beam_candidates
from luban.kernels.dispatch import VARIABLE, check_kernel
from luban.models.base import Model
from luban.serve.adapters import AdapterPool
from luban.serve.batch import BatchLoad, LostProcess, Token
from luban.serve.beam_group import BeamGroup
from luban.serve.block_manager import BlockManager, source_identity
from luban.serve.decode_ahead import DecodeAhead, InFlight
from luban.serve.model_runner import weights_version
from luban.serve.pool import PoolSettings, make_pool
from luban.serve.request import Request
from luban.serve.scheduler import Chunk, Scheduler, SequenceState, Step, together
from luban.serve.speculation import DRAFT_TOKENS, DraftProposer, NgramProposer, Proposer, verify

if TYPE_CHECKING:
    from luban.serve.tensor.leader import Leader


class PagedBatch:
    """See `luban.serve.batch.Batch`.

    Args:
        module: of which `paging_refusal` says nothing. UnsupportedError where it writes no text.
        max_batch: sequences that run together; None: 256.
        cache_bytes: for keys and values; None: what `PagedBudget.of` finds.
        max_tokens: that a forward reads; None: 8,192 on CUDA, 512 elsewhere, and twice `max_batch` at least.
        block_size: slots a block. cache_dtype: of keys and values, "auto" (the model's) or "fp8".
        prefix_cache: whether what prompts have in common is read once.
        draft: a smaller model that guesses tokens (`luban.serve.speculation`). UnsupportedError for another vocabulary.
        ngram: whether tokens are guessed from what followed the same ones before.
        draft_tokens: guessed at once.
        kernel: of attention, "torch" or "luban"; None: that of the environment's LUBAN_ATTENTION, or the fastest that can serve.
        swap_bytes: of host memory for what preempted sequences have computed; 0, or where it is full: they are read again.
        batch_invariant: outputs are bit for bit those of a request alone; the module's matmuls are replaced.
        adapters: of which requests may ask for one.
        leader: of the processes that hold the model together, of which `module` is this one's part; None: there is one process.
    """

    def __init__(
        self,
        module: Model,
        *,
        max_batch: int | None = None,
        cache_bytes: int | None = None,
        max_tokens: int | None = None,
        block_size: int = BLOCK_SIZE,
        cache_dtype: str = "auto",
        prefix_cache: bool = True,
        draft: Model | None = None,
        ngram: bool = False,
        draft_tokens: int = DRAFT_TOKENS,
        kernel: str | None = None,
        swap_bytes: int = 0,
        batch_invariant: bool = False,
        adapters: AdapterPool | None = None,
        leader: Leader | None = None,
    ):
        self.spec, self.prompts, self.leader = module.spec, prompts_of(module.spec), leader
        kernel = check_kernel(kernel or os.environ.get(VARIABLE) or None)
        settings = PoolSettings(
            max_batch=max_batch,
            max_tokens=max_tokens,
            cache_bytes=cache_bytes,
            block_size=block_size,
            cache_dtype=cache_dtype,
            kernel=kernel,
            swap_bytes=swap_bytes,
            batch_invariant=batch_invariant,
        )
        if leader is None:
            pool = make_pool(module, settings, draft=draft, adapters=adapters)
        else:
            pool = leader.pool(settings, draft=draft)
        self.budget, self.runner, cache = pool.budget, pool.runner, pool.runner.cache
        sequences, tokens = settings.sequences(), settings.tokens(cache.device.type)
        self.draft_tokens, self.drafted, self.accepted = draft_tokens, 0, 0  # counts of guesses
        self.proposer: Proposer | None = NgramProposer() if ngram else None
        if draft is not None:
            self.proposer = DraftProposer(
                draft,
                vocab_size=self.spec.vocab_size,
                blocks=cache.blocks,
                block_size=block_size,
                max_tokens=tokens,
                kernel=kernel,
            )
        self._scheduler = lambda: Scheduler(
            BlockManager(pool.blocks, block_size, prefix_cache=prefix_cache),
            max_sequences=sequences,
            max_tokens=tokens,
            host=BlockManager(pool.host_blocks, block_size, prefix_cache=False) if pool.host_blocks else None,
        )
        self.scheduler = self._scheduler()
        self._growing: dict[SequenceState, Growing] = {}
        self._states: dict[int, SequenceState] = {}  # by id of the growing sequence
        self._beams: dict[int, BeamGroup] = {}  # by id of the growing sequence that stands for a search
        simple = self.proposer is None and not batch_invariant
        self._ahead: DecodeAhead | None = None
        if simple and not self.spec.body.two_sided:
            self._ahead = DecodeAhead(self._growing, self.max_new_tokens)
        # On a GPU the next forward is submitted before the last one's tokens are known; elsewhere those would wait for it.
        self.runs_ahead = cache.device.type == "cuda"
        self._flight: InFlight | None = None  # that was submitted so
        self._numbers = count()
        self._weights = weights_version(module)

    @property
    def sequences(self) -> Sequence[Growing]:
        """Those that hold blocks."""
        return [self._growing[state] for state in self.scheduler.running]

    def check(self, prompt: list[int]) -> None:
        """As `luban.generate.prompts` does."""
        self.prompts.check(prompt)

    def max_new_tokens(self, prompt: list[int]) -> int:
        """Tokens of an answer that the context holds."""
        return self.prompts.max_new_tokens(prompt)

    def takes(self, request: Request, others: Sequence[Request]) -> bool:
        """All: the scheduler orders them."""
        return True

    def start(self, requests: list[Request]) -> list[tuple[Request, Exception]]:
        """Queue them, but for those that would never fit."""
        failed: list[tuple[Request, Exception]] = []
        for request in requests:
            try:
                self.check(request.prompt)
                self.budget.require(request.prompt, request.sampling)
            except Exception as error:
                failed.append((request, error))
                continue
            number, states = next(self._numbers), []
            source = self.prompts.source(request.prompt)
            identity = source_identity(request.identity, source) if source else request.identity
            for growing in request.growing:
                state = SequenceState(
                    self.prompts.first_tokens(request.prompt),
                    (request.priority, number, growing.choice),
                    identity,
                    request.adapter,
                    source=source,
                )
                state.read_whole = request.sampling.prompt_logprobs is not None and growing.choice == 0
                self._growing[state], self._states[id(growing)] = growing, state
                if request.sampling.beams > 1:
                    self._beams[id(growing)] = BeamGroup(growing, state, self.max_new_tokens(request.prompt))
                states.append(state)
            self.scheduler.add(together(states))
        return failed

    def next_tokens(self, meanwhile: Callable[[], None]) -> list[tuple[Growing, list[Token]]]:
        """One forward; those whose tokens are all read get others."""
        flight, self._flight = self._flight, None
        if flight is not None and any(chunk.state in self._growing for chunk in flight.chunks):
            return self._go_on_ahead(flight, meanwhile)
        if not self.scheduler.running:
            self._forget_other_weights()
        step = self._plan()
        read, logits_RV, failed = self._read(step.chunks)
        if logits_RV is not None and not failed and self.runs_ahead and self._ahead and self._ahead.serves(read):
            return self._go_on_ahead(self._ahead.draw(read, logits_RV), meanwhile)
        meanwhile()  # a GPU is still at it
        found: dict[int, tuple[Growing, list[Token]]] = {}
        for chunk, error in failed:
            for state in (chunk.state, *chunk.state.siblings):
                growing = self._growing[state]
                found[id(growing)] = growing, [error]
        ready: list[SequenceState] = []
        rows: list[range] = []  # of each of them, in the logits
        row = 0
        for chunk in read:
            following, wanted = self.scheduler.advance(chunk), chunk.wanted
            ready += following
            rows += [range(row, row + wanted)] * len(following)
            row += wanted
        if ready and logits_RV is not None:
            logits_RV = self._forced(ready, rows, logits_RV)
            sampled = [i for i, state in enumerate(ready) if self._group(state) is None]
            searched = [i for i, state in enumerate(ready) if self._group(state) is not None] if self._beams else []
            for chosen, give in ((sampled, self._sample), (searched, self._search)):
                if chosen:
                    wanted = [row for i in chosen for row in rows[i]]
                    part = logits_RV if wanted == list(range(len(logits_RV))) else logits_RV[wanted]
                    give([ready[i] for i in chosen], part, found)
        self._require_all()
        return list(found.values())

    def _go_on_ahead(self, flight: InFlight, meanwhile: Callable[[], None]) -> list[tuple[Growing, list[Token]]]:
        """The tokens of a forward that is in flight, once the one behind it has been submitted, if it can be."""
        assert self._ahead is not None
        self._flight = self._ahead.submit_next(flight, self.scheduler, self.runner)
        meanwhile()
        found = self._ahead.synchronize(flight, self.scheduler)
        self._require_all()
        return found

    def _require_all(self) -> None:
        """Raise LostProcess where a process is gone: without it what was read is of no meaning."""
        if self.leader is not None:
            self.leader.check()

    @torch.inference_mode()
    def _plan(self) -> Step:
        """The next forward, with the guesses that it reads."""
        if self.proposer is not None:
            for state in self.scheduler.running:
                growing = self._growing[state]
                left = growing.sampling.max_tokens - len(growing.tokens), self.spec.context - len(state.tokens)
                state.most_draft = 0 if self._group(state) else max(0, min(self.draft_tokens, min(left) - 1))
        step = self.scheduler.schedule()
        for state in step.admitted:
            self._growing[state].cached_tokens = state.cached
        self.runner.copy(step)
        if self.proposer is not None:
            self.proposer.copy(step.copies)
            drafted = [chunk for chunk in step.chunks if chunk.drafts]
            self.proposer.propose([(chunk.state, self._growing[chunk.state], chunk.drafts) for chunk in drafted])
            for chunk in drafted:
                chunk.drafts = len(chunk.state.draft)
                chunk.count = 1 + chunk.drafts
                self.drafted += chunk.drafts
        return step

    @torch.inference_mode()
    def _forced(self, ready: list[SequenceState], rows: list[range], logits_RV: Tensor) -> Tensor:
        """The logits, where a sequence's next token is fixed those that leave only it."""
        for state, row in zip(ready, rows, strict=True):
            if (token := self.prompts.forced(self._growing[state])) is not None:
                logits_RV[row.start] = float("-inf")
                logits_RV[row.start, token] = 0.0
        return logits_RV

    def _group(self, state: SequenceState) -> BeamGroup | None:
        """The beam search that a state is part of."""
        return self._beams.get(id(self._growing[state])) if self._beams else None

    @torch.inference_mode()
    def _sample(
        self, ready: list[SequenceState], logits_RV: Tensor, found: dict[int, tuple[Growing, list[Token]]]
    ) -> None:
        """Draw a token for each, and more where guesses were right."""
        growing, drafts = [self._growing[state] for state in ready], [state.draft for state in ready]
        tokens = verify(logits_RV, growing, drafts, self.prompts.seen)
        for state, sequence, chosen in zip(ready, growing, tokens, strict=True):
            found[id(sequence)] = sequence, list(chosen)
            self.accepted += len(chosen) - 1
            self.scheduler.take(state, [token for token in chosen if isinstance(token, int)])

    @torch.inference_mode()
    def _search(
        self, ready: list[SequenceState], logits_RV: Tensor, found: dict[int, tuple[Growing, list[Token]]]
    ) -> None:
        """Give beam searches the candidates of their hypotheses; a search that has those of all continues."""
        groups = [self._beams[id(self._growing[state])] for state in ready]
        sequences = [group.sequence(state) for group, state in zip(groups, ready, strict=True)]
        wanted = max(group.search.wanted for group in groups)
        candidates = beam_candidates(logits_RV, sequences, self.prompts.seen, wanted)
        for group, state, following in zip(groups, ready, candidates, strict=True):
            if following is None:
                found[id(group.growing)] = group.growing, [None]
            else:
                group.candidates[state] = following[: group.search.wanted]
        for group in dict.fromkeys(groups):
            if id(group.growing) in found or not group.complete:
                continue
            before = set(group.states)
            answers = group.expand(self.scheduler)
            for state in before.difference(group.states):
                del self._growing[state]
            self._growing |= dict.fromkeys(group.states, group.growing)
            if answers is not None:
                found[id(group.growing)] = group.growing, [answers]

    def _read(self, chunks: Sequence[Chunk]) -> tuple[Sequence[Chunk], Tensor | None, list[tuple[Chunk, Exception]]]:
        """Chunks that were read, the logits (R, V) of what follows those that end their sequence, and chunks that failed.
        Where a forward fails they are read one by one, so that none fails for another's sake."""
        if not chunks:
            return [], None, []
        try:
            for chunk in chunks:
                chunk.scored = self._scored(chunk)
            return chunks, self.runner.run(chunks, self._score), []
        except LostProcess:
            raise
        except Exception as error:
            if len(chunks) == 1:
                return [], None, [(chunks[0], error)]
        read, logits, failed = [], [], []
        for chunk in chunks:
            one_read, one_V, one_failed = self._read([chunk])
            read += one_read
            failed += one_failed
            logits += [] if one_V is None else [one_V.clone()]
        return read, torch.cat(logits) if logits else None, failed

    def _scored(self, chunk: Chunk) -> int:
        """Tokens of a chunk, from the first one, whose next token's log-probability is asked for."""
        growing = self._growing[chunk.state]
        if not chunk.state.read_whole or growing.sampling.prompt_logprobs is None:
            return 0
        return max(0, min(chunk.count, len(growing.prompt) - 1 - chunk.start))

    def _score(self, chunk: Chunk, hidden_TE: Tensor) -> None:
        """Keep log-probabilities of a prompt's tokens that follow those of a chunk."""
        growing = self._growing[chunk.state]
        alternatives, first = growing.sampling.prompt_logprobs, chunk.start + 1
        assert alternatives is not None
        found = scored(self.runner.module, hidden_TE, growing.prompt[first : first + chunk.scored], alternatives)
        growing.prompt_logprobs[chunk.start :] = found  # again where it was preempted

    def _forget_other_weights(self) -> None:
        """Keys and values of other weights than now are no prefix of anything."""
        version = weights_version(self.runner.module)
        if version != self._weights:
            self.runner.clear_graphs()
            self.scheduler.manager.clear_prefix_cache()
            self._weights = version

    def weights_changed(self) -> None:
        """Drop the prefix cache. Recorded graphs stay: they read the weights where they lie.

        Raises UnsupportedError where several processes hold the weights.
        """
        if self.leader is not None:
            raise UnsupportedError(
                "weights that plan.tensor divides are copies: make another engine of those that changed"
            )
        self.scheduler.manager.clear_prefix_cache()
        version = weights_version(self.runner.module)
        if [place for place, _ in version] == [place for place, _ in self._weights]:
            self._weights = version

    def go_on(self, ended: list[Growing]) -> None:
        """Nothing is read before the next step."""
        self.leave(ended)

    def leave(self, sequences: list[Growing]) -> None:
        """Give their blocks back."""
        for growing in sequences:
            state, group = self._states.pop(id(growing), None), self._beams.pop(id(growing), None)
            for each in group.states if group else [state] if state else []:
                self.scheduler.remove(each)
                del self._growing[each]
                if self.proposer is not None:
                    self.proposer.forget(each)

    def load(self) -> BatchLoad:
        """Blocks that sequences hold, and counts of the scheduler."""
        scheduler, manager = self.scheduler, self.scheduler.manager
        return BatchLoad(
            running=len(scheduler.running),
            waiting=sum(state.width for state in list(scheduler.waiting)),
            cache_usage=1 - manager.free / manager.blocks,
            prompt_tokens=scheduler.prompt_tokens,
            prefix_hits=scheduler.prefix_hits,
            preemptions=scheduler.preemptions,
            swaps=scheduler.swaps,
            drafted=self.drafted,
            accepted=self.accepted,
        )

    def clear(self) -> None:
        """Begin anew, as after a step that broke in the middle: no count or content of a block is relied on."""
        self.scheduler = self._scheduler()
        self._growing.clear()
        self._states.clear()
        self._beams.clear()
        self._flight = None

    def watch(self, watcher: Callable[[LostProcess], None]) -> None:
        """Of the other processes that hold the model."""
        if self.leader is not None:
            self.leader.watch(watcher)

    def close(self) -> None:
        """End the other processes."""
        if self.leader is not None:
            self.leader.close()
