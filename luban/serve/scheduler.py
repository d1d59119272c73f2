"""Which tokens the next forward reads: one budget of tokens a step for prompts and for continuations alike.

Pure Python over ints. Every running sequence has tokens that the forward hasn't read yet: one where it grows, many where
its prompt is new or where it was preempted. Nothing else tells the two apart. Sequences are served first come, first
served: the oldest always gets on, younger ones give their blocks up to it (preemption) and are read again later, or
their blocks' content is kept in host memory (recomputation and swapping, Kwon et al. 2023, section 4.5), so that whatever
is admitted ends. An encoder–decoder's sequence holds the keys and values of its source in blocks of the same pool.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from luban.core.errors import ConfigError
from luban.serve.block_manager import BlockManager, prefix_key, source_keys

SHARES = 8  # parts of prompts a step at most, where they are long
RESERVED = 100  # one block in so many stays free at admission, for sequences that run to grow into


class Swapped(NamedTuple):
    """What a preempted sequence has kept in host memory."""

    blocks: list[int]  # of the host: those of its tokens, then those of its source
    computed: int  # tokens
    key: bytes  # of the last full block


@dataclass(eq=False)
class SequenceState:
    """One continuation of a prompt, as the scheduler sees it."""

    tokens: list[int]  # the prompt's, then the generated ones
    arrival: tuple[int, ...]  # priority, number of the request, which of its continuations; the smaller runs first
    identity: str = ""  # what keys and values depend on beside the tokens: adapter and source
    adapter: str = ""  # its name; none: the model alone
    siblings: list[SequenceState] = field(default_factory=list)  # continuations that begin where this prompt ends
    table: list[int] = field(default_factory=list)  # blocks; of all tokens while it runs
    computed: int = 0  # tokens whose keys and values are in the pool
    key: bytes = b""  # of the last full block
    draft: list[int] = field(default_factory=list)  # guesses of what follows the tokens
    most_draft: int = 0  # guesses that the next forward may read
    agreed: int = 0  # tokens up to which the last guesses were right
    admissions: int = 0  # how often it was given blocks
    cached: int = 0  # tokens, of the source too, that the prefix cache held when it was first given blocks
    spare: int = 0  # continuations that `Scheduler.fork` will make of it
    read_whole: bool = False  # whether every token must be read, found in the prefix cache or not
    source: list[int] = field(default_factory=list)  # tokens that an encoder reads; none: a decoder alone
    source_table: list[int] = field(default_factory=list)  # blocks of the source, all while it runs
    source_read: bool = False  # whether the source's keys and values are in its blocks
    swapped: Swapped | None = None  # while it waits, where it was preempted to host memory

    @property
    def unread(self) -> int:
        """Tokens that the model hasn't read; none only while a beam search waits for its other hypotheses."""
        return len(self.tokens) - self.computed

    @property
    def unread_source(self) -> int:
        """Tokens of the source that the next forward must encode."""
        return 0 if self.source_read else len(self.source)

    @property
    def width(self) -> int:
        """Continuations that run once its prompt is read."""
        return 1 + len(self.siblings) + self.spare


@dataclass
class Chunk:
    """Tokens `start` … `start + count − 1` of a sequence, which one forward reads."""

    state: SequenceState
    start: int
    count: int
    drafts: int = 0  # of the count: guesses at the end
    scored: int = 0  # of the count: tokens at the beginning whose next token's log-probability is asked for

    @property
    def last(self) -> bool:
        """Whether the sequence's next token is wanted."""
        return self.start + self.count == len(self.state.tokens) + len(self.state.draft)

    @property
    def wanted(self) -> int:
        """Logits that are wanted: of the next token, and of what follows each guess."""
        return 1 + self.drafts if self.last else 0

    @property
    def tokens(self) -> list[int]:
        """The token ids."""
        state, stop = self.state, self.start + self.count
        if stop <= len(state.tokens):
            return state.tokens[self.start : stop]
        return (state.tokens + state.draft)[self.start : stop]


@dataclass
class Step:
    """One forward."""

    chunks: list[Chunk] = field(default_factory=list)
    # blocks to copy before it, in this order: to host memory, within the pool, from host memory; (source, copy) each
    swaps_out: list[tuple[int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    swaps_in: list[tuple[int, int]] = field(default_factory=list)
    admitted: list[SequenceState] = field(default_factory=list)  # sequences that were given blocks for the first time


def arrival(state: SequenceState) -> tuple[int, ...]:
    """The order of service."""
    return state.arrival


class Scheduler:
    """Admits, orders and preempts sequences.

    Args:
        manager: of the blocks.
        max_sequences: that run together; a request with more continuations runs alone.
        max_tokens: that a forward reads; a source is read whole, and may exceed what is left of them.
        host: blocks of host memory, to which preempted sequences are swapped while there are enough; None: their tokens
            are read again.

    Raises:
        ConfigError: a budget that growing sequences alone would use up.
    """

    def __init__(self, manager: BlockManager, *, max_sequences: int, max_tokens: int, host: BlockManager | None = None):
        if not 1 <= max_sequences < max_tokens:
            raise ConfigError(
                f"{max_tokens} tokens a step for {max_sequences} sequences that each want one leave none for prompts: "
                "the tokens must be more"
            )
        self.manager, self.max_sequences, self.max_tokens, self.host = manager, max_sequences, max_tokens, host
        self.waiting: list[SequenceState] = []  # both in the order of arrival
        self.running: list[SequenceState] = []
        self.preemptions = self.swaps = 0  # swaps: preemptions to host memory
        self.prompt_tokens = self.prefix_hits = 0  # admitted, and of them found in the prefix cache

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.running)

    def add(self, state: SequenceState) -> None:
        """Queue a sequence (with its siblings). The caller sees that one continuation fits the pool when it is alone."""
        insort(self.waiting, state, key=arrival)

    def fork(self, state: SequenceState, arrival: tuple[int, ...]) -> SequenceState:
        """Another sequence with the same tokens, which holds the same blocks, or waits where the first one waits."""
        child = SequenceState(list(state.tokens), arrival, state.identity, state.adapter, source=state.source)
        child.admissions = state.admissions
        self._share(state, child)
        insort(self.running if state in self.running else self.waiting, child, key=lambda other: other.arrival)
        return child

    def remove(self, state: SequenceState) -> None:
        """Forget a sequence, whatever it is doing, with those siblings that haven't begun. Its blocks are free at once."""
        if state in self.running:
            self.running.remove(state)
            self._release(state)
        elif state in self.waiting:
            self.waiting.remove(state)
            self._forget_swapped(state)
        state.siblings.clear()

    def _share(self, state: SequenceState, other: SequenceState) -> None:
        """Let another sequence with the same tokens and source hold the same blocks."""
        other.table, other.computed, other.key = self.manager.fork(state.table), state.computed, state.key
        other.source_table, other.source_read = self.manager.fork(state.source_table), state.source_read

    def schedule(self) -> Step:
        """Plan a forward. Blocks are held and given up as if it had already been run; `advance` says that it has."""
        step = Step()
        budget = self.max_tokens
        for state in list(self.running):
            state.draft = []
            if state.unread == 1 and budget and self._hold_next(state, step):
                drafts = self._hold_drafts(state, min(state.most_draft, budget - 1))
                step.chunks.append(Chunk(state, state.computed, 1 + drafts, drafts))
                budget -= 1 + drafts
        self._read_prompts(step, budget)
        return step

    def only_decodes(self, states: Sequence[SequenceState]) -> bool:
        """Whether `schedule`, once each of these sequences has another token, reads those tokens and nothing else, and takes
        no blocks from others nor copies any."""
        if any(state.unread for state in self.running):
            return False
        if self.waiting and self._admissible(self.waiting[0]) is not None:
            return False
        new, size = 0, self.manager.block_size
        for state in states:
            index = state.computed // size
            if index == len(state.table):
                new += 1
            elif self.manager.references[state.table[index]] > 1:
                return False
        return new <= self.manager.free

    def _hold_next(self, state: SequenceState, step: Step) -> bool:
        """See that the slot of a sequence's newest token is its own, at the cost of younger sequences. False: it was
        preempted, now or before."""
        if not state.table:
            return False
        index = state.computed // self.manager.block_size
        grows = index == len(state.table)
        while (grows or self.manager.references[state.table[index]] > 1) and not self.manager.free:
            self._preempt(self.running[-1], step)
            if not state.table:
                return False
        if grows:
            state.table += self.manager.allocate([], 1) or []
        elif copied := self.manager.write(state.table, index):
            step.copies.append(copied)
        return True

    def _hold_drafts(self, state: SequenceState, most: int) -> int:
        """Slots for guesses behind a sequence's newest token, at nobody's cost; returns for how many there are."""
        if most < 1:
            return 0
        new = self.manager.blocks_for(len(state.tokens) + most) - len(state.table)
        if new > 0 and (blocks := self.manager.allocate([], new)) is not None:
            state.table += blocks
        return min(most, len(state.table) * self.manager.block_size - len(state.tokens))

    def _read_prompts(self, step: Step, budget: int) -> None:
        """Fill the budget with parts of prompts, admitting what fits. A prompt gets half of what is left while others come
        after it, so that short ones needn't wait until a long one is read; at the end what they leave."""
        reading = [state for state in self.running if state.unread > 1]
        chunks: list[Chunk] = []
        smallest = budget // SHARES  # no forward of crumbs
        while budget and (state := reading.pop(0) if reading else self._admit(step)):
            most = max(-(-budget // 2), smallest) if reading or self.waiting else budget
            chunks.append(Chunk(state, state.computed, min(state.unread, most, budget)))
            budget = max(0, budget - chunks[-1].count - state.unread_source)
        for chunk in chunks:
            more = min(chunk.state.unread - chunk.count, budget)
            chunk.count += more
            budget -= more
        step.chunks += chunks

    def _admit(self, step: Step) -> SequenceState | None:
        """Begin the first waiting sequence if blocks for all of its tokens are there; nothing overtakes it."""
        if not self.waiting:
            return None
        state = self.waiting[0]
        if (blocks := self._admissible(state)) is None:
            return None
        shared, source, new, new_source = blocks
        state.key = self.manager.key(shared, state.identity)
        state.source_table = self.manager.allocate(source, 0) or []  # held before blocks are taken for others
        state.table = self.manager.allocate(shared, new) or []
        state.source_table += self.manager.allocate([], new_source) or []
        state.source_read = bool(source)
        state.computed = len(shared) * self.manager.block_size
        state.admissions += 1
        if state.swapped is None:
            found = state.computed + (len(state.source) if source else 0)
            self.prompt_tokens += len(state.tokens) + len(state.source)
            self.prefix_hits += found
            if state.admissions == 1:
                state.cached = found
                step.admitted.append(state)
        else:
            self._swap_in(state, state.swapped, step)
        insort(self.running, self.waiting.pop(0), key=arrival)
        return state

    def _admissible(self, state: SequenceState) -> tuple[list[int], list[int], int, int] | None:
        """What a waiting sequence begins with: known blocks of its tokens and of its source, and how many new ones of each. None
        where it must wait, for blocks or because as many sequences run as may."""
        if self.running and sum(other.width for other in self.running) + state.width > self.max_sequences:
            return None
        whole = state.read_whole or state.swapped is not None
        shared = [] if whole else self.manager.match(state.tokens, state.identity)
        source = [] if state.swapped else self._find_source(state)
        new = self.manager.blocks_for(len(state.tokens)) - len(shared)
        new_source = self.manager.blocks_for(len(state.source)) - len(source)
        reserve = -(-self.manager.blocks // RESERVED) if self.running else 0
        fits = self.manager.can_allocate([*shared, *source], new + new_source + reserve)
        return (shared, source, new, new_source) if fits else None

    def _find_source(self, state: SequenceState) -> list[int]:
        """Blocks that hold the whole source, of another sequence or from before a preemption; none where it must be read."""
        if not state.source:
            return []
        return self.manager.find(source_keys(state.identity, self.manager.blocks_for(len(state.source))))

    def _preempt(self, state: SequenceState, step: Step) -> None:
        """Give up all blocks of a sequence, which will be read again or is kept in host memory."""
        self.running.remove(state)
        self._swap_out(state, step)
        self._release(state)
        insort(self.waiting, state, key=arrival)
        self.preemptions += 1

    def _swap_out(self, state: SequenceState, step: Step) -> None:
        """Keep what is computed of a sequence in host memory, if there is enough."""
        blocks = [*state.table[: self.manager.blocks_for(state.computed)], *state.source_table]
        if self.host is None or not state.computed or (kept := self.host.allocate([], len(blocks))) is None:
            return
        step.swaps_out += zip(blocks, kept, strict=True)
        state.swapped = Swapped(kept, state.computed, state.key)
        self.swaps += 1

    def _swap_in(self, state: SequenceState, swapped: Swapped, step: Step) -> None:
        """Have the content of a sequence's blocks brought back. Its host blocks are given out again in a later step at the
        earliest, since a step preempts before it admits."""
        blocks = [*state.table[: self.manager.blocks_for(swapped.computed)], *state.source_table]
        step.swaps_in += zip(swapped.blocks, blocks, strict=True)
        state.computed, state.key, state.source_read = swapped.computed, swapped.key, bool(state.source)
        self._forget_swapped(state)

    def _forget_swapped(self, state: SequenceState) -> None:
        if self.host is not None and state.swapped is not None:
            self.host.release(state.swapped.blocks)
        state.swapped = None

    def _release(self, state: SequenceState) -> None:
        self.manager.release(state.table)
        self.manager.release(state.source_table)
        state.table, state.computed, state.source_table, state.source_read = [], 0, [], False

    def advance(self, chunk: Chunk) -> list[SequenceState]:
        """Note that a chunk was read. Returns the sequences whose next token its last logits give: none within a prompt,
        all continuations of the prompt at its end, which hold its blocks together from then on."""
        state = chunk.state
        if state.unread_source:
            for block, key in zip(
                state.source_table, source_keys(state.identity, len(state.source_table)), strict=True
            ):
                self.manager.remember(block, key)
            state.source_read = True
        self._computed(state, chunk.start + chunk.count - chunk.drafts)
        if not chunk.last:
            return []
        ready = [state, *state.siblings]
        for sibling in state.siblings:
            self._share(state, sibling)
            insort(self.running, sibling, key=arrival)
        state.siblings = []
        return ready

    def _computed(self, state: SequenceState, count: int) -> None:
        """Note that keys and values of a sequence's first `count` tokens are in its blocks."""
        size = self.manager.block_size
        before, state.computed = state.computed // size, count
        if self.manager.prefix_cache:
            for index in range(before, count // size):
                state.key = prefix_key(state.key, state.tokens[index * size : (index + 1) * size])
                self.manager.remember(state.table[index], state.key)

    def take(self, state: SequenceState, tokens: list[int]) -> None:
        """Append tokens, of which all but the last were guesses that the forward has read."""
        state.agreed = len(state.tokens) + len(tokens) - 1
        state.tokens += tokens
        state.draft = []
        if len(tokens) > 1:
            self._computed(state, state.computed + len(tokens) - 1)
        if surplus := state.table[self.manager.blocks_for(len(state.tokens)) :]:  # of guesses that weren't kept
            self.manager.release(surplus)
            del state.table[-len(surplus) :]


def together(states: Iterable[SequenceState]) -> SequenceState:
    """Continuations of one prompt as one sequence with siblings."""
    first, *rest = states
    first.siblings = rest
    return first
