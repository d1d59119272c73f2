"""The dynamic program behind POFO: which stages are saved, which segments are computed again, and what of it goes to the host.

The forward pass is a sequence of items: a stage that is saved, or a segment of which only the input is kept and which Rotor's
table computes again in the backward pass. What an item keeps either stays or is offloaded. The transfers to the host follow the
forward pass, those back follow the backward pass read backwards in time, so both run along the chain from its beginning: a state is
(stage reached, memory kept, backlog of transfers out, backlog of transfers in), its value the seconds of all items so far in both
passes, waits for memory included. At the loss what is left in both backlogs needn't move at all. States that are worse than another in
every respect are dropped, and so are the slowest beyond WIDTH at each stage.

The times are the program's own estimate; `pofo` times the schedules that it returns exactly. After Beaumont et al. 2021, section 4,
whose states are like these; theirs has no backlog in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from luban.planner.remat.chain import Chain, Operation
from luban.planner.remat.rotor import RotorTable, in_units, unrolled

WIDTH = 64  # states kept at each stage
RETURNED = 6  # schedules


@dataclass(frozen=True)
class State:
    """The items up to a stage."""

    seconds: float
    kept: float  # memory
    leaving: float  # backlog to the host at the end of the items' forward pass
    coming: float  # backlog from the host at the beginning of their backward pass
    items: tuple[
        tuple[int, int, int, bool], ...
    ] = ()  # first stage, past the last, Rotor's memory (−1: saved), offloaded


def offloading_plans(
    chain: Chain, budget: float, bandwidth: float
) -> Iterator[tuple[list[Operation], set[tuple[str, int]]]]:
    """Schedules by the program's estimate, the fastest first, each with the tensors that it means to offload.

    Args:
        bandwidth: sizes a second each way, above 0.
    """
    units, capacity = in_units(chain, budget)
    rate = bandwidth * capacity / budget
    program = _Program(units, capacity, rate)
    for state in program.run()[:RETURNED]:
        offloaded = {("saved" if memory < 0 else "x", first) for first, _, memory, away in state.items if away}
        yield program.operations(state), offloaded


class _Program:
    def __init__(self, chain: Chain, capacity: int, rate: float):
        self.chain, self.capacity, self.rate = chain, capacity, rate
        self.table = RotorTable(chain, capacity)

    def run(self) -> list[State]:
        """The states at the loss, the fastest first."""
        stages = len(self.chain)
        at: list[list[State]] = [[] for _ in range(stages + 1)]
        at[0] = [State(0.0, float(self.chain.x(0)), 0.0, 0.0)]
        for first in range(stages):
            for state in _front(at[first]):
                for following, past in self._extended(state, first):
                    at[past].append(following)
        ended = []
        for state in at[stages]:
            both = min(state.leaving, state.coming)  # of the newest tensors: they stay
            rest = (state.leaving + state.coming - 2 * both) / self.rate
            if state.kept + both <= self.capacity:
                ended.append(replace(state, seconds=state.seconds + rest))
        return sorted(ended, key=lambda state: state.seconds)

    def _extended(self, state: State, first: int) -> Iterator[tuple[State, int]]:
        """Every item that may come next."""
        chain, (forward, backward) = self.chain, self.chain.seconds(first)
        temps = chain.temps(first)
        saved = float(chain.saved(first))
        needs = saved + temps[0], saved + chain.x(first + 1) + temps[1]
        yield from self._after(state, (first, first + 1, -1), (forward, backward), needs, saved)
        passed, wide = 0.0, 0.0
        for past in range(first + 1, len(chain) + 1):
            passed += chain.seconds(past - 1)[0]
            before = chain.x(past - 1) if past - 1 > first else 0.0
            wide = max(wide, before + chain.x(past) + chain.temps(past - 1)[0])
            own = 0.0 if first == 0 else float(chain.x(first))  # the chain's input is kept already
            for full in (False, True):  # of the memory that transfers back hold, or with all of them done
                waits = state.coming if full else 0.0
                memory = int(self.capacity - state.kept - (state.coming - waits) - own)
                again = self.table.time(first, past - 1, memory)
                if again < inf:
                    drained = replace(state, coming=state.coming - waits, seconds=state.seconds + waits / self.rate)
                    item = (first, past, memory)
                    yield from self._after(drained, item, (passed, again), (own + wide, 0.0), own)

    def _after(
        self,
        state: State,
        item: tuple[int, int, int],
        seconds: tuple[float, float],
        needs: tuple[float, float],
        size: float,
    ) -> Iterator[tuple[State, int]]:
        """The state behind an item that keeps `size`, which stays or leaves."""
        backlogs, total = [], state.seconds
        for backlog, time, need in zip((state.leaving, state.coming), seconds, needs, strict=True):
            excess = max(state.kept + backlog + need - self.capacity, 0.0)
            if excess > backlog + 1e-9:
                return
            wait = excess / self.rate
            total += wait + time
            backlogs.append(max(backlog - self.rate * (wait + time), 0.0))
        leaving, coming = backlogs
        yield State(total, state.kept + size, leaving, coming, (*state.items, (*item, False))), item[1]
        if size:
            offloaded = State(total, state.kept, leaving + size, coming + size, (*state.items, (*item, True)))
            yield offloaded, item[1]

    def operations(self, state: State) -> list[Operation]:
        """The schedule that a state stands for."""
        chain, stages = self.chain, len(self.chain)
        forward: list[Operation] = []
        backward: list[Operation] = []
        for first, past, memory, _ in state.items:
            if memory < 0:
                forward.append(Operation("forward_save", first))
                backward[:0] = [Operation("backward", first)]
            else:
                forward.append(Operation("forward_keep", first))
                forward += [Operation("forward", i) for i in range(first + 1, past)]
                backward[:0] = unrolled(stages, self.table.choose, chain, memory, (first, past - 1))
        return [*forward, Operation("loss", stages), *backward]


def _front(states: list[State]) -> list[State]:
    """States that none is better than in every respect, the fastest WIDTH of them."""
    kept: list[State] = []
    for state in sorted(states, key=lambda s: (s.seconds, s.kept, s.leaving + s.coming)):
        if not any(
            other.kept <= state.kept and other.leaving <= state.leaving and other.coming <= state.coming
            for other in kept
        ):
            kept.append(state)
            if len(kept) == WIDTH:
                break
    return kept
