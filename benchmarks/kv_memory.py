"""Share of KV memory that holds tokens: blocks, a contiguous cache, and reservation of the longest sequence.

    python benchmarks/kv_memory.py [--sequences 2000] [--slots 65536] [--block-size 16] [--context 2048]

The comparison of Kwon et al. 2023 (PagedAttention, figures 2 and 12) without a model: one memory of `--slots` tokens, the
same requests in the same order, whose prompts and answers have log-normal lengths like conversations'. Per policy: the mean
number of sequences that run together while requests wait, the share of occupied slots that hold a token, and for blocks the
slots without a token per sequence, beside (block − 1) / 2. Blocks are those of the scheduler that serves (`luban.serve.scheduler`);
the contiguous cache pads every row to the longest; reservation holds prompt + the next power of two of the answer's length
(what an oracle of length would hold), prompt + max_tokens, or the whole context.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from luban.serve.block_manager import BlockManager
from luban.serve.scheduler import Scheduler, SequenceState


@dataclass
class Tally:
    """Means over the steps in which requests waited."""

    running: list[int] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    waste: list[int] = field(default_factory=list)  # slots without a token of each sequence

    def row(self, name: str) -> str:
        """One line of the table."""
        waste = f"{fmean(self.waste):12.1f}{max(self.waste):9}" if self.waste else ""
        return f"{name:34}{fmean(self.running):10.1f}{100 * fmean(self.shares):10.1f}%{waste}"


Lengths = Sequence[tuple[int, int]]  # prompt, answer


def drawn(count: int, context: int, seed: int) -> Lengths:
    """Lengths as of conversations: median prompt 120 tokens and answer 180, long tails, cut at the context."""
    rng = random.Random(seed)
    prompts = [min(context // 2, max(1, int(rng.lognormvariate(4.8, 1.0)))) for _ in range(count)]
    return [(p, min(context - p, max(1, int(rng.lognormvariate(5.2, 0.8))))) for p in prompts]


def run_blocks(lengths: Lengths, slots: int, size: int) -> Tally:
    """The scheduler that serves, every sequence of tokens of its own."""
    manager = BlockManager(slots // size, size, prefix_cache=False)
    scheduler = Scheduler(manager, max_sequences=slots, max_tokens=slots + 8192)
    ends: dict[SequenceState, int] = {}
    for number, (prompt, answer) in enumerate(lengths):
        state = SequenceState([0] * prompt, (number, 0))
        ends[state] = prompt + answer
        scheduler.add(state)
    tally = Tally()
    while scheduler.waiting:
        step = scheduler.schedule()
        running = scheduler.running
        held = (manager.blocks - manager.free) * size
        tally.running.append(len(running))
        tally.shares.append(sum(len(state.tokens) for state in running) / held)
        tally.waste += [len(state.table) * size - len(state.tokens) for state in running]
        for chunk in step.chunks:
            for state in scheduler.advance(chunk):
                state.tokens.append(0)
                if len(state.tokens) >= ends[state]:
                    scheduler.remove(state)
    return tally


def run_whole(
    lengths: Lengths, fits: Callable[[list[list[int]]], bool], held: Callable[[list[list[int]]], int]
) -> Tally:
    """Sequences [tokens now, prompt, answer] that keep their memory from beginning to end."""
    waiting, running, tally = list(reversed(lengths)), [], Tally()
    while waiting:
        while waiting and fits([*running, [waiting[-1][0], *waiting[-1]]]):
            prompt, answer = waiting.pop()
            running.append([prompt, prompt, answer])
        tally.running.append(len(running))
        tally.shares.append(sum(each[0] for each in running) / held(running))
        for each in running:
            each[0] += 1
        running = [each for each in running if each[0] < each[1] + each[2]]
    return tally


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("sequences", 2000), ("slots", 65_536), ("block-size", 16), ("context", 2048), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    lengths, slots = drawn(args.sequences, args.context, args.seed), args.slots
    most = max(answer for _, answer in lengths)

    def reserved(each: Callable[[list[int]], int]) -> Tally:
        def held(running: list[list[int]]) -> int:
            return sum(map(each, running))

        return run_whole(lengths, lambda running: held(running) <= slots, held)

    def padded(running: list[list[int]]) -> int:
        return len(running) * max((prompt + answer for _, prompt, answer in running), default=0)

    blocks = run_blocks(lengths, slots, args.block_size)
    rows = {
        f"blocks of {args.block_size}": blocks,
        "contiguous, padded to the longest": run_whole(lengths, lambda running: padded(running) <= slots, padded),
        "reserved: next power of two": reserved(lambda each: each[1] + (1 << (each[2] - 1).bit_length())),
        "reserved: prompt + max_tokens": reserved(lambda each: min(args.context, each[1] + most)),
        "reserved: whole context": reserved(lambda each: args.context),
    }
    print(f"{'':34}{'together':>10}{'tokens':>11}{'mean waste':>12}{'largest':>9}")
    for name, tally in rows.items():
        print(tally.row(name))
    mean = fmean(blocks.waste)
    together = {name: fmean(tally.running) for name, tally in rows.items()}
    times = together[f"blocks of {args.block_size}"] / together["reserved: whole context"]
    print(
        f"mean waste {mean:.2f} slots, (block - 1) / 2 = {(args.block_size - 1) / 2}; {times:.1f} times the sequences of max-length reservation"
    )


if __name__ == "__main__":
    main()
