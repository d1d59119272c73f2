"""Blocks and schedule against a pool that is written out: what every slot holds, after every step of random work."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from luban.core.errors import ConfigError
from luban.serve.block_manager import BlockManager, source_identity
from luban.serve.scheduler import Chunk, Scheduler, SequenceState, together

Content = tuple[str, int]  # identity, hash of all tokens up to this one


def content(state: SequenceState, end: int) -> list[Content]:
    """What the slots of the first `end` tokens must hold."""
    found, chain = [], 0
    for token in state.tokens[:end]:
        chain = hash((chain, token))
        found.append((state.identity, chain))
    return found


@dataclass
class Engine:
    """Does with `slots` what a model does with keys and values, and checks every read."""

    scheduler: Scheduler
    rng: random.Random
    limit: dict[SequenceState, int] = field(default_factory=dict)  # tokens at which a sequence ends
    slots: dict[int, Content] = field(default_factory=dict)
    host: dict[int, Content] = field(default_factory=dict)  # what slots of host memory hold
    done: int = 0
    encoded: int = 0  # sources
    waste: list[int] = field(default_factory=list)

    def slot(self, state: SequenceState, at: int) -> int:
        size = self.scheduler.manager.block_size
        return state.table[at // size] * size + at % size

    def source_slot(self, state: SequenceState, at: int) -> int:
        size = self.scheduler.manager.block_size
        return state.source_table[at // size] * size + at % size

    def step(self) -> None:
        size = self.scheduler.manager.block_size
        step = self.scheduler.schedule()
        self.check()
        copied = (
            (step.swaps_out, self.slots, self.host),
            (step.copies, self.slots, self.slots),
            (step.swaps_in, self.host, self.slots),
        )
        for pairs, origin, target in copied:
            for source, copy in pairs:
                for offset in range(size):
                    target[copy * size + offset] = origin.get(source * size + offset, ("", 0))
        assert sum(chunk.count for chunk in step.chunks) <= self.scheduler.max_tokens
        kept = [
            copy for _, copy in step.swaps_out
        ]  # which may come back in the same step, where their tokens are shared
        assert len(set(kept)) == len(kept)
        assert len({id(chunk.state) for chunk in step.chunks}) == len(step.chunks)
        self.waste += [len(chunk.state.table) * size - len(chunk.state.tokens) for chunk in step.chunks]
        written: list[int] = []
        for chunk in step.chunks:
            state, end = chunk.state, chunk.start + chunk.count
            assert chunk.count > 0 and chunk.start == state.computed and end <= len(state.tokens)
            expected = content(state, end)
            for at in range(chunk.start, end):
                written.append(self.slot(state, at))
                self.slots[written[-1]] = expected[at]
            assert [self.slots[self.slot(state, at)] for at in range(end)] == expected
            self.encoded += bool(state.unread_source)
            for at in range(len(state.source)):
                if state.unread_source:
                    self.slots[self.source_slot(state, at)] = (state.identity, at)
                assert self.slots[self.source_slot(state, at)] == (state.identity, at)
        assert len(set(written)) == len(written)  # nobody writes where another does
        assert not set(written) & self.read_by_others(step.chunks)
        for chunk in step.chunks:
            for state in self.scheduler.advance(chunk):
                state.tokens.append(self.rng.randrange(3))
                if len(state.tokens) >= self.limit[state]:
                    self.scheduler.remove(state)
                    self.done += 1
        self.check()

    def read_by_others(self, chunks: list[Chunk]) -> set[int]:
        """Slots with what sequences have already computed: no forward may change them."""
        return {self.slot(s, at) for s in self.scheduler.running for at in range(s.computed)}

    def check(self) -> None:
        """No block lost, none used twice, counts as many as tables."""
        manager, running = self.scheduler.manager, self.scheduler.running
        counts = Counter(block for state in running for block in (*state.table, *state.source_table))
        assert manager.references == [counts[block] for block in range(manager.blocks)]
        free = [*manager._blank, *manager._cached]
        assert sorted(free) == [block for block in range(manager.blocks) if not counts[block]]
        assert sorted(manager._block_of.values()) == [b for b, key in enumerate(manager._key_of) if key]
        assert all(manager._key_of[block] for block in manager._cached)
        assert not any(manager._key_of[block] for block in manager._blank)
        waiting, host = self.scheduler.waiting, self.scheduler.host
        assert not any(state.table or state.source_table or state.computed for state in waiting)
        assert not any(state.swapped for state in running)
        if host is not None:
            kept = [block for state in waiting if state.swapped for block in state.swapped.blocks]
            assert sorted(kept) == [block for block, count in enumerate(host.references) if count]
            assert len(set(kept)) == len(kept)
        for state in running:
            unread = max(1, state.unread)
            assert len(state.table) in (manager.blocks_for(len(state.tokens)), manager.blocks_for(state.computed))
            assert unread + state.computed == max(len(state.tokens), state.computed + 1)
        order = [state.arrival for state in (*running, *self.scheduler.waiting)]
        assert order == sorted(order)


def make(rng: random.Random, number: int, most: int, longest_source: int) -> tuple[SequenceState, int]:
    """Continuations of one prompt, which often begins as others do, and where they end."""
    shared = [0, 1] * 30 if rng.random() < 0.6 else [rng.randrange(3) for _ in range(60)]
    prompt = shared[: rng.randrange(1, min(60, most - 1))] + [rng.randrange(3) for _ in range(rng.randrange(2))]
    prompt = prompt[: most - 1]
    end, identity = rng.randrange(len(prompt) + 1, most + 1), rng.choice(["", "", "adapter"])
    source = [rng.randrange(2) for _ in range(rng.randrange(1, longest_source + 1))] if longest_source else []
    identity = source_identity(identity, source) if source else identity
    states = [
        SequenceState(list(prompt), (number, i), identity, source=source) for i in range(rng.choice([1, 1, 1, 2, 5]))
    ]
    return together(states), end


@pytest.mark.parametrize("host_blocks", [None, 7, 100])
@pytest.mark.parametrize("sources", [False, True])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_random_work_loses_no_block_and_reads_what_was_written(size, prefix_cache, sources, host_blocks):
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(2):
        blocks = rng.randrange(6, 40)
        manager = BlockManager(blocks, size, prefix_cache=prefix_cache)
        sequences = rng.randrange(1, 12)
        host = None if host_blocks is None else BlockManager(host_blocks, size, prefix_cache=False)
        scheduler = Scheduler(manager, max_sequences=sequences, max_tokens=sequences + rng.randrange(1, 40), host=host)
        engine, asked, cancelled = Engine(scheduler, rng), 0, 0
        for number in range(40):
            longest = (blocks // 2) * size if sources else 0
            leader, end = make(rng, number, min(blocks * size - longest, 80), min(longest, 5))
            asked += leader.width
            engine.limit |= dict.fromkeys((leader, *leader.siblings), end)
            scheduler.add(leader)
            for _ in range(rng.choice([0, 1, 3, 10])):
                engine.step()
            if rng.random() < 0.3 and scheduler.busy:  # somebody leaves, at whatever it is
                state = rng.choice([*scheduler.waiting, *scheduler.running])
                cancelled += state.width
                scheduler.remove(state)
                engine.check()
        steps = 0
        while scheduler.busy:
            engine.step()
            steps += 1
            assert steps < 20_000
        assert engine.done + cancelled == asked  # whatever was admitted ended
        assert manager.references == [0] * blocks and manager.free == blocks
        assert not scheduler.prefix_hits or prefix_cache
        assert host is None or host.free == host.blocks
        assert scheduler.swaps <= scheduler.preemptions and (host is not None or not scheduler.swaps)
        assert bool(engine.encoded) == sources
        assert all(0 <= waste < size for waste in engine.waste)


def test_slots_without_tokens_are_half_a_block_on_average(seed=7):
    rng = random.Random(seed)
    manager = BlockManager(4000, 16)
    engine = Engine(Scheduler(manager, max_sequences=200, max_tokens=4000), rng)
    for number in range(200):
        state = SequenceState([number] * rng.randrange(50, 300), (number, 0))
        engine.limit[state] = 400
        engine.scheduler.add(state)
    for _ in range(30):
        engine.step()
    assert sum(engine.waste) / len(engine.waste) <= 7.5 * 1.1 and max(engine.waste) == 15
    held = 16 * (manager.blocks - manager.free)
    assert sum(len(state.tokens) for state in engine.scheduler.running) / held > 0.96


def run(scheduler: Scheduler, steps: int = 1) -> list[dict[int, int]]:
    """Steps; every sequence goes on. Returns request → tokens read, for each."""
    found = []
    for _ in range(steps):
        step = scheduler.schedule()
        found.append({chunk.state.arrival[0]: chunk.count for chunk in step.chunks})
        for chunk in step.chunks:
            for state in scheduler.advance(chunk):
                state.tokens.append(99)
    return found


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = Scheduler(BlockManager(100, 16), max_sequences=8, max_tokens=65)
    scheduler.add(SequenceState([1] * 1000, (0, 0)))
    assert run(scheduler) == [{0: 65}]
    scheduler.add(SequenceState([2] * 20, (1, 0)))
    scheduler.add(SequenceState([3] * 500, (2, 0)))
    assert run(scheduler, 2) == [{0: 33, 1: 16, 2: 16}, {0: 33, 1: 4, 2: 28}]
    assert run(scheduler) == [{1: 1, 0: 32, 2: 32}]


def test_a_prompt_that_is_cached_whole_still_reads_its_last_token():
    manager = BlockManager(20, 4)
    scheduler = Scheduler(manager, max_sequences=4, max_tokens=50)
    for number, tokens in enumerate(([1] * 8, [1] * 8, [1] * 9, [1] * 7 + [2])):
        scheduler.add(state := SequenceState(tokens, (number, 0)))
        (step,) = run(scheduler)
        assert step == {number: (8, 4, 1, 4)[number]}
        scheduler.remove(state)


def test_samples_of_one_prompt_hold_its_blocks_together():
    manager = BlockManager(40, 4)
    scheduler = Scheduler(manager, max_sequences=8, max_tokens=50)
    scheduler.add(together([SequenceState([1] * 10, (0, i)) for i in range(5)]))
    run(scheduler)
    assert manager.free == 37 and len({tuple(state.table) for state in scheduler.running}) == 1
    step = scheduler.schedule()
    assert len(step.copies) == 4 and manager.free == 33  # of the block that isn't full; the last keeps the original
    assert len({state.table[2] for state in scheduler.running}) == 5


def test_the_youngest_gives_way_and_finds_its_beginning_again():
    manager = BlockManager(6, 4)
    scheduler = Scheduler(manager, max_sequences=4, max_tokens=50)
    old, young = SequenceState([1] * 11, (0, 0)), SequenceState([2] * 8, (1, 0))
    for state in (old, young):
        scheduler.add(state)
    run(scheduler, 2)  # 12 and 9 tokens in 3 blocks each
    assert manager.free == 0
    run(scheduler)
    assert scheduler.waiting == [young] and scheduler.preemptions == 1 and len(old.tokens) == 14
    scheduler.remove(old)
    assert run(scheduler) == [{1: 2}]  # of 10 tokens 8 were still there


def test_identities_share_nothing_and_other_weights_forget():
    manager = BlockManager(20, 4)
    scheduler = Scheduler(manager, max_sequences=4, max_tokens=50)
    scheduler.add(first := SequenceState([1] * 9, (0, 0), "a"))
    run(scheduler)
    scheduler.remove(first)
    assert manager.match([1] * 9, "b") == [] and len(manager.match([1] * 9, "a")) == 2
    manager.clear_prefix_cache()
    assert manager.match([1] * 9, "a") == [] and manager.free == 20


def test_a_budget_without_tokens_for_prompts_is_refused():
    with pytest.raises(ConfigError, match="leave none for prompts"):
        Scheduler(BlockManager(4, 4), max_sequences=8, max_tokens=8)


class Hypothetical:
    """Does at random what engines do to a scheduler: reads, guesses, forks, cancels; and counts."""

    def __init__(self, rng: random.Random, blocks: int, size: int):
        self.rng, self.scheduler = rng, Scheduler(BlockManager(blocks, size), max_sequences=6, max_tokens=24)
        self.most, self.number, self.forks, self.cancelled = blocks * size, 0, 0, 0

    def add(self) -> None:
        length = self.rng.randrange(1, min(self.most - 6, 40))
        prompt = ([0, 1] * 20)[:length] if self.rng.random() < 0.5 else [self.rng.randrange(3) for _ in range(length)]
        states = [
            SequenceState(list(prompt), (self.rng.randrange(3), self.number, i))
            for i in range(self.rng.choice([1, 1, 3]))
        ]
        states[0].read_whole = self.rng.random() < 0.2
        self.number += 1
        self.scheduler.add(together(states))

    def step(self) -> None:
        for state in self.scheduler.running:
            state.most_draft = self.rng.choice([0, 0, 3])
        step = self.scheduler.schedule()
        for chunk in step.chunks:
            if chunk.drafts:  # fewer guesses than there was room for
                chunk.drafts = self.rng.randrange(chunk.drafts + 1)
                chunk.count = 1 + chunk.drafts
                chunk.state.draft = [self.rng.randrange(3) for _ in range(chunk.drafts)]
        for chunk in step.chunks:
            for state in self.scheduler.advance(chunk):
                kept = state.draft[: self.rng.randrange(len(state.draft) + 1)]
                self.scheduler.take(state, [*kept, self.rng.randrange(3)])
                if len(state.tokens) + 6 > self.most or self.rng.random() < 0.1:
                    self.scheduler.remove(state)

    def fork(self) -> None:
        ready = [state for state in self.scheduler.running if state.unread == 1]
        if ready and len(self.scheduler.running) < 6:
            parent = self.rng.choice(ready)
            self.scheduler.fork(parent, (*parent.arrival, self.forks))
            self.forks += 1

    def cancel(self) -> None:
        if states := [*self.scheduler.running, *self.scheduler.waiting]:
            self.scheduler.remove(self.rng.choice(states))
            self.cancelled += 1

    def check(self) -> None:
        manager = self.scheduler.manager
        counts = Counter(block for state in self.scheduler.running for block in state.table)
        assert manager.references == [counts[block] for block in range(manager.blocks)]
        assert manager.free == sum(count == 0 for count in manager.references)
        for state in self.scheduler.running:
            assert 0 <= state.computed <= len(state.tokens) <= self.most
            assert manager.blocks_for(state.computed) <= len(state.table) <= manager.blocks_for(len(state.tokens))


def test_ten_thousand_random_operations_lose_no_block():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, operations, preemptions, forks = random.Random(seed), 0, 0, 0
    while operations < 10_000:
        work = Hypothetical(rng, rng.randrange(8, 40), rng.choice([1, 2, 4, 16]))
        for _ in range(500):
            rng.choice([work.add, work.step, work.step, work.step, work.fork, work.cancel])()
            work.check()
            operations += 1
        preemptions, forks = preemptions + work.scheduler.preemptions, forks + work.forks
        for state in [*work.scheduler.running, *work.scheduler.waiting]:
            work.scheduler.remove(state)
        manager = work.scheduler.manager
        assert not any(manager.references) and manager.free == manager.blocks
    assert preemptions > 100 and forks > 100
