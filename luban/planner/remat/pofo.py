"""Rematerialisation with offloading: a schedule for a larger budget, made to fit by moving tensors to the host and back.

The problem is that of Beaumont et al. 2021, Efficient combination of rematerialization and offloading for training DNNs
(POFO). Schedules come from a dynamic program like theirs (`pofo_program.py`), and from Rotor for a range of larger budgets; in each,
whenever memory runs out, the tensor whose next use is farthest is offloaded, and it is fetched again as early as memory allows.
Transfers overlap with computation, one at a time in each direction; gradients and the chain's input stay. All are timed alike, and the fastest is
returned: never slower than Rotor in the same memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from luban.core.errors import ConfigError
from luban.planner.remat.chain import Chain, Operation, Schedule, save_everything
from luban.planner.remat.pofo_program import offloading_plans
from luban.planner.remat.rotor import rotor, schedules_within

BUDGETS = 24  # larger ones that are tried


@dataclass
class Tensor:
    """One life of a tensor: from the operation that makes it to the one that frees it. Numbers index operations."""

    name: tuple[str, int]  # "x", "saved" or "gradient", and stage or index
    size: float
    first: int  # during which it is in memory first
    uses: list[int] = field(default_factory=list)
    last: int = 0  # during which it is in memory last


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A tensor's way to the host and back. Numbers index operations."""

    name: tuple[str, int]
    size: float
    after: int  # it may leave as soon as this one is done
    gone: int  # this one waits until it has left
    back: int  # it may come back as soon as this one begins, into memory that is free from here on
    needed: int  # this one waits until it is back


@dataclass(frozen=True, kw_only=True)
class OffloadSchedule:
    """Operations in order and the transfers beside them."""

    operations: tuple[Operation, ...]
    transfers: tuple[Transfer, ...]
    makespan: float  # seconds, waiting for transfers included
    peak: float  # of memory, the chain's input included


def pofo(chain: Chain, budget: float, bandwidth: float) -> OffloadSchedule:
    """The fastest schedule found whose peak is at most `budget`.

    Args:
        budget: memory, the chain's input included, in the unit of the chain's sizes.
        bandwidth: sizes a second, to the host and from it each; 0: no offloading.

    Raises:
        ConfigError: bandwidth isn't a number from 0, or nothing fits the budget.
    """
    if not bandwidth >= 0:
        raise ConfigError(f"bandwidth is a number from 0, not {bandwidth}")
    found: list[OffloadSchedule] = []
    try:
        found.append(_without_transfers(_rotor(chain, budget)))
    except ConfigError:
        if bandwidth == 0:
            raise
    top = save_everything(chain).peak
    if bandwidth > 0 and budget < top:
        budgets = [budget + (top - budget) * k / BUDGETS for k in range(1, BUDGETS)]
        for schedule in [*schedules_within(chain, budgets), save_everything(chain)]:
            fitted = offload(chain, schedule.operations, budget, bandwidth)
            found += [fitted] if fitted is not None else []
        for operations, meant in offloading_plans(chain, budget, bandwidth):
            for only in (meant, None):
                fitted = offload(chain, operations, budget, bandwidth, only)
                found += [fitted] if fitted is not None else []
    if not found:
        raise ConfigError(f"a budget of {budget:g} is too small for this chain, with offloading too")
    return min(found, key=lambda schedule: (schedule.makespan, len(schedule.transfers)))


def _rotor(chain: Chain, budget: float) -> Schedule:
    return rotor(
        chain.forward,
        chain.backward,
        chain.output_size,
        chain.saved_size,
        budget,
        input_size=chain.input_size,
        forward_temp=chain.forward_temp,
        backward_temp=chain.backward_temp,
    )


def _without_transfers(schedule: Schedule) -> OffloadSchedule:
    return OffloadSchedule(operations=schedule.operations, transfers=(), makespan=schedule.makespan, peak=schedule.peak)


def lives(chain: Chain, operations: Sequence[Operation]) -> list[Tensor]:
    """Every tensor's life under a schedule without offloading."""
    alive = {("x", 0): Tensor(("x", 0), chain.x(0), 0)}
    ended: list[Tensor] = []

    def end(name: tuple[str, int], at: int) -> None:
        if name in alive:
            alive[name].last = at
            ended.append(alive.pop(name))

    for k, op in enumerate(operations):
        i = op.stage
        source = ("x", i) if ("x", i) in alive else ("saved", i - 1)
        used = [source, ("saved", i), ("gradient", i + 1)] if op.action == "backward" else [source]
        for name in used:
            alive[name].uses.append(k)
        if op.action in ("loss", "backward"):
            for name in (("x", i), ("saved", i), ("gradient", i + 1)):
                end(name, k)
            alive["gradient", i] = Tensor(("gradient", i), chain.x(i), k + 1)
        else:
            name, size = (
                (("saved", i), chain.saved(i)) if op.action == "forward_save" else (("x", i + 1), chain.x(i + 1))
            )
            alive[name] = Tensor(name, size, k, [k])
            if op.action == "forward":
                end(("x", i), k)
    for name in list(alive):
        end(name, len(operations) - 1)
    return ended


def offload(
    chain: Chain,
    operations: Sequence[Operation],
    budget: float,
    bandwidth: float,
    only: Collection[tuple[str, int]] | None = None,
) -> OffloadSchedule | None:
    """The schedule with transfers that bring its peak to at most `budget`; None: some operation alone needs more.

    Args:
        only: tensors that may leave, by kind and number; None: all but gradients and the
            chain's input.
    """
    tensors = lives(chain, operations)
    memory = [chain.temps(op.stage)[op.action == "backward"] for op in operations]
    for tensor in tensors:
        for k in range(tensor.first, tensor.last + 1):
            memory[k] += tensor.size
    gaps = _evict(tensors, memory, budget, only)
    if gaps is None:
        return None
    transfers = []
    for tensor, after, gone, needed in sorted(gaps, key=lambda gap: gap[3]):
        back = needed
        while back - 1 >= gone and memory[back - 1] + tensor.size <= budget:
            back -= 1
            memory[back] += tensor.size
        transfers.append(Transfer(name=tensor.name, size=tensor.size, after=after, gone=gone, back=back, needed=needed))
    seconds = _timed(chain, operations, transfers, bandwidth)
    gradient = chain.x(0)  # in memory when all is done
    return OffloadSchedule(
        operations=tuple(operations), transfers=tuple(transfers), makespan=seconds, peak=max(*memory, gradient)
    )


def _evict(
    tensors: Sequence[Tensor], memory: list[float], budget: float, only: Collection[tuple[str, int]] | None
) -> list[tuple[Tensor, int, int, int]] | None:
    """(tensor, last use before, first operation without it, next use) of what is offloaded; `memory` is changed to what is left
    of it during each operation. A tensor is away once at most."""
    gaps: list[tuple[Tensor, int, int, int]] = []
    away: set[int] = set()
    for k in range(len(memory)):
        while memory[k] > budget:
            choices = [
                (min(u for u in t.uses if u > k), index)
                for index, t in enumerate(tensors)
                if index not in away and t.size and t.first < k < t.last and k not in t.uses and max(t.uses) > k
                if t.name[0] != "gradient" and t.name != ("x", 0) and (only is None or t.name in only)
            ]
            if not choices:
                return None
            needed, index = max(choices)
            tensor = tensors[index]
            away.add(index)
            # free to leave after its last use, or the operation that made it
            gaps.append((tensor, max([u for u in tensor.uses if u < k], default=tensor.first - 1), k, needed))
            for j in range(k, needed):
                memory[j] -= tensor.size
    return gaps


def _timed(chain: Chain, operations: Sequence[Operation], transfers: Sequence[Transfer], bandwidth: float) -> float:
    """Seconds until the last operation is done. Transfers leave in the order in which they may, and come back likewise."""
    time, out_free, in_free = 0.0, 0.0, 0.0
    left: dict[int, float] = {}  # transfer → when it has left
    arrived: dict[int, float] = {}
    waiting = sorted(range(len(transfers)), key=lambda t: (transfers[t].after, transfers[t].gone))
    for k, op in enumerate(operations):
        while waiting and transfers[waiting[0]].after < k:
            t = waiting.pop(0)
            out_free = left[t] = max(time, out_free) + transfers[t].size / bandwidth
        for t, transfer in enumerate(transfers):
            if transfer.gone == k:
                time = max(time, left[t])
        for t, transfer in enumerate(transfers):
            if transfer.back == k:
                in_free = arrived[t] = max(time, in_free) + transfer.size / bandwidth
        for t, transfer in enumerate(transfers):
            if transfer.needed == k:
                time = max(time, arrived[t])
        time += 0.0 if op.action == "loss" else chain.seconds(op.stage)[op.action == "backward"]
    return time
