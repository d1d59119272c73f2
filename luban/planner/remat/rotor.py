"""Rotor: the fastest memory-persistent schedule of a heterogeneous chain within a memory budget.

Beaumont et al. 2019, Optimal checkpointing for heterogeneous chains: how to train deep neural networks with limited memory,
theorem 1. Memory-persistent: what is kept is kept until its backward pass; without that condition the problem is NP-hard.

Temporary memory is counted where it is used: a stage's forward pass beside the gradient held meanwhile, its backward pass
beside the gradient of its output, a stage that is passed only in the choices that pass it. The paper's recurrence takes one
bound for all choices, which without temporary memory is the same; with it, schedules here are at least as fast, and where a
stage's saved tensors and temporary memory don't fit beside that gradient, the paper's exceed the budget.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil, gcd, inf, isnan
from numbers import Real

from luban.core.errors import ConfigError
from luban.planner.remat.chain import Chain, Operation, Schedule, save_everything, simulate

SLOTS = 500  # units of memory of the dynamic program

Choose = Callable[
    [int, int, float], int | None
]  # first stage, last stage, memory → j (keep x_j), or None: save the first


def rotor(
    forward: Sequence[float],
    backward: Sequence[float],
    output_size: Sequence[float],
    saved_size: Sequence[float],
    budget: float,
    *,
    input_size: float | None = None,
    forward_temp: Sequence[float] = (),
    backward_temp: Sequence[float] = (),
) -> Schedule:
    """The fastest memory-persistent schedule whose peak is at most `budget`.

    Exact where sizes are integers and the budget is at most 500 times their greatest common divisor, and where everything can
    be saved. Otherwise the budget is divided into 500 slots and sizes are rounded up to whole slots.

    Args: see `Chain`.
        budget: memory, the chain's input included, in the unit of the sizes.

    Raises:
        ConfigError: a size, a time or the budget is no number from 0, lengths differ, or the budget is below the least that any schedule
            needs, which is named.
    """
    chain = Chain(
        forward=forward,
        backward=backward,
        output_size=output_size,
        saved_size=saved_size,
        input_size=input_size,
        forward_temp=forward_temp,
        backward_temp=backward_temp,
    )
    if not isinstance(budget, Real) or isnan(budget):
        raise ConfigError(f"a budget is a number in the unit of the sizes, not {budget!r}")
    fastest = save_everything(chain)
    if fastest.peak <= budget:
        return fastest
    least = _least_memory(chain)
    needed = least[0, len(chain)] + chain.x(0)
    if not needed <= budget:
        raise ConfigError(f"a budget of {budget:g} is too small for this chain: at least {needed:g} is needed")
    units, capacity = in_units(chain, budget)
    memory = int(capacity - units.x(0))
    if memory >= 0 and (table := RotorTable(units, memory)).time(0, len(chain), memory) < inf:
        return simulate(chain, unrolled(len(chain), table.choose, units, memory))

    # rounded sizes don't fit, exact ones do: the schedule with the least memory
    def frugal(first: int, last: int, _memory: float) -> int | None:
        return min(_memory_of_choices(chain, least, first, last), key=lambda choice: choice[0])[1]

    return simulate(chain, unrolled(len(chain), frugal, chain, budget))


def least_memory(chain: Chain) -> float:
    """The least budget of any schedule, the chain's input included."""
    return _least_memory(chain)[0, len(chain)] + chain.x(0)


def schedules_within(chain: Chain, budgets: Sequence[float]) -> list[Schedule]:
    """Schedules for several budgets by one dynamic program over the largest; those that are too small have none."""
    units, capacity = in_units(chain, max(budgets))
    largest = int(capacity - units.x(0))
    if largest < 0:
        return []
    table = RotorTable(units, largest)
    memories = {int(capacity * budget / max(budgets)) - int(units.x(0)) for budget in budgets}
    return [
        simulate(chain, unrolled(len(chain), table.choose, units, memory))
        for memory in sorted(memories)
        if table.time(0, len(chain), memory) < inf
    ]


def in_units(chain: Chain, budget: float) -> tuple[Chain, int]:
    """The chain and the budget in units of memory: whole ones where at most 500 do, else slots."""
    sizes = [chain.x(0), *chain.output_size, *chain.saved_size, *chain.forward_temp, *chain.backward_temp]
    unit = float(gcd(*(int(size) for size in sizes))) if all(size == int(size) for size in sizes) else 0.0
    if unit == 0 or budget // unit > SLOTS:
        unit = budget / SLOTS
    capacity = int(budget // unit) if budget // unit <= SLOTS else SLOTS

    def rounded(values: Sequence[float]) -> list[int]:
        return [ceil(value / unit) for value in values]

    changed = {
        name: rounded(getattr(chain, name)) for name in ("output_size", "saved_size", "forward_temp", "backward_temp")
    }
    return replace(chain, input_size=rounded([chain.x(0)])[0], **changed), capacity


def _saving_needs(chain: Chain, first: int, last: int) -> float:
    """Memory for saving stage `first` of first … last and for its backward pass, its input not counted. Meanwhile the gradient
    of the last one's output is in memory, or that of its own."""
    forward, backward = chain.temps(first)
    return chain.saved(first) + max(chain.x(last + 1) + forward, chain.x(first + 1) + backward)


def _passes(chain: Chain, first: int, last: int) -> Iterator[tuple[int, float, float]]:
    """For each j that may be kept next: j, seconds to get there from `first`, and memory needed on the way, the input of the
    first not counted."""
    seconds, needed = 0.0, 0.0
    for j in range(first + 1, last + 1):
        before = chain.x(j - 1) if j - 1 > first else 0
        needed = max(needed, before + chain.x(j) + chain.temps(j - 1)[0])
        seconds += chain.seconds(j - 1)[0]
        yield j, seconds, chain.x(last + 1) + needed


def _least_memory(chain: Chain) -> dict[tuple[int, int], float]:
    """Least memory of a schedule for each (first, last), the input of the first not counted."""
    least: dict[tuple[int, int], float] = {}
    for length in range(len(chain) + 1):
        for first in range(len(chain) + 1 - length):
            last = first + length
            choices = _memory_of_choices(chain, least, first, last)
            least[first, last] = min(memory for memory, _ in choices)
    return least


def _memory_of_choices(
    chain: Chain, least: dict[tuple[int, int], float], first: int, last: int
) -> list[tuple[float, int | None]]:
    """Least memory of each choice (see `Choose`)."""
    saving = _saving_needs(chain, first, last)
    if first == last:
        return [(saving, None)]
    kept = [
        (max(needed, chain.x(j) + least[j, last], least[first, j - 1]), j)
        for j, _, needed in _passes(chain, first, last)
    ]
    return [(max(saving, chain.saved(first) + least[first + 1, last]), None), *kept]


class RotorTable:
    """Opt[first, last][m]: least seconds for stages first … last in m units, the input of the first not counted."""

    def __init__(self, chain: Chain, capacity: int):
        self.chain, self.capacity = chain, capacity
        self.rows: dict[tuple[int, int], array[float]] = {}
        for length in range(len(chain) + 1):
            for first in range(len(chain) + 1 - length):
                self.rows[first, first + length] = self._row(first, first + length)

    def time(self, first: int, last: int, memory: int) -> float:
        """Seconds; infinite: doesn't fit."""
        return self.rows[first, last][memory] if memory >= 0 else inf

    def _row(self, first: int, last: int) -> array[float]:
        size, chain = self.capacity + 1, self.chain
        best, alone = [inf] * size, float(sum(chain.seconds(first)))
        low = int(_saving_needs(chain, first, last))
        if first == last:
            return array("d", [*best[:low], *[alone] * (size - low)])
        shift = int(chain.saved(first))
        if low < size:
            best[low:] = [alone + rest for rest in self.rows[first + 1, last][low - shift : size - shift]]
        for j, seconds, needed in _passes(chain, first, last):
            shift = int(chain.x(j))
            low = max(int(needed), shift)
            left, right = self.rows[first, j - 1], self.rows[j, last]
            best[low:] = [
                time if (time := seconds + a + b) < c else c
                for a, b, c in zip(left[low:], right[low - shift :], best[low:], strict=False)
            ]
        return array("d", best)

    def choose(self, first: int, last: int, memory: float) -> int | None:
        """The choice behind a value of the table; of equals, saving comes first."""
        chain, m = self.chain, int(memory)
        choices: list[tuple[float, int | None]] = []
        if m >= _saving_needs(chain, first, last):
            rest = self.time(first + 1, last, m - int(chain.saved(first)))
            choices.append((sum(chain.seconds(first)) + rest, None))
        for j, seconds, needed in _passes(chain, first, last):
            if m >= needed:
                rest = self.time(j, last, m - int(chain.x(j)))
                choices.append((seconds + self.time(first, j - 1, m) + rest, j))
        return min(choices, key=lambda choice: choice[0])[1]


def unrolled(
    stages: int, choose: Choose, chain: Chain, memory: float, part: tuple[int, int] | None = None
) -> list[Operation]:
    """The operations that the choices stand for, of stages `part[0]` … `part[1]`; None: of the whole chain with its loss."""
    operations: list[Operation] = []
    begin, end = part or (0, stages)
    pending: list[Operation | tuple[int, int, float]] = [(begin, end, memory)]
    while pending:
        item = pending.pop()
        if isinstance(item, Operation):
            operations.append(item)
            continue
        first, last, m = item
        if first == stages:
            operations.append(Operation("loss", stages))
        elif first == last:
            operations += [Operation("forward_save", first), Operation("backward", first)]
        elif (j := choose(first, last, m)) is None:
            operations.append(Operation("forward_save", first))
            pending += [Operation("backward", first), (first + 1, last, m - chain.saved(first))]
        else:
            operations.append(Operation("forward_keep", first))
            operations += [Operation("forward", i) for i in range(first + 1, j)]
            pending += [(first, j - 1, m), (j, last, m - chain.x(j))]
    return operations
