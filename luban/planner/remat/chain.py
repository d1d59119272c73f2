"""A chain of stages with their costs, and schedules of its forward and backward passes whose memory can be counted.

Stage i turns x_i into x_{i+1}; x_0 is the chain's input; a loss, which costs nothing, follows the last stage. What a forward
pass saves for the backward pass, x̄_{i+1}, contains its output x_{i+1}. Beaumont et al. 2019, Optimal checkpointing for
heterogeneous chains, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from luban.core.errors import ConfigError

Action = Literal[
    "forward",  # x_i → x_{i+1}; x_i is freed
    "forward_keep",  # x_i → x_{i+1}; x_i stays
    "forward_save",  # x_i → x̄_{i+1}; x_i stays
    "loss",  # x_L → its gradient
    "backward",  # x_i, x̄_{i+1} and the gradient of x_{i+1} → the gradient of x_i, which takes their place
]


@dataclass(frozen=True)
class Operation:
    """A step of a schedule."""

    action: Action
    stage: int


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Costs of a chain of L stages: times and sizes in any one unit each.

    A backward pass that holds the gradients of its input and of its output at once beyond what it frees says so in
    `backward_temp`.
    """

    forward: Sequence[float]  # seconds of each stage's forward pass, length L
    backward: Sequence[float]  # seconds of each backward pass, length L
    output_size: Sequence[float]  # of x_1 … x_L, length L; gradients are as large
    saved_size: Sequence[float]  # of x̄_1 … x̄_L, outputs included, length L
    input_size: float | None = None  # of x_0; None: that of x_1
    forward_temp: Sequence[float] = ()  # needed while a forward pass runs, length L; empty: none
    backward_temp: Sequence[float] = ()  # needed while a backward pass runs, length L; empty: none

    def __post_init__(self) -> None:
        for name in ("forward", "backward", "output_size", "saved_size", "forward_temp", "backward_temp"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name)))  # arrays may be given
        if self.input_size is not None:
            object.__setattr__(self, "input_size", _numbers("input_size", [self.input_size])[0])
        if not self.forward:
            raise ConfigError("a chain has at least one stage")
        for name in ("forward", "backward", "output_size", "saved_size", "forward_temp", "backward_temp"):
            values = getattr(self, name)
            if len(values) != len(self) and (values or not name.endswith("temp")):
                raise ConfigError(f"{name} has {len(values)} values for {len(self)} stages")
            _check(name, values)
        _check("input_size", [self.x(0)])

    def __len__(self) -> int:
        return len(self.forward)

    def x(self, index: int) -> float:
        """Size of x_index: 0 is the chain's input, L + 1 what the loss returns, of no size."""
        if index == 0:
            return self.output_size[0] if self.input_size is None else self.input_size
        return self.output_size[index - 1] if index <= len(self) else 0

    def saved(self, stage: int) -> float:
        """Size of what stage's forward pass saves; nothing for the loss, which is stage L."""
        return self.saved_size[stage] if stage < len(self) else 0

    def temps(self, stage: int) -> tuple[float, float]:
        """Sizes needed while the stage's forward and its backward pass run."""
        forward = self.forward_temp[stage] if self.forward_temp and stage < len(self) else 0
        backward = self.backward_temp[stage] if self.backward_temp and stage < len(self) else 0
        return forward, backward

    def seconds(self, stage: int) -> tuple[float, float]:
        """Seconds of the stage's forward and backward pass; the loss, stage L, takes none."""
        return (self.forward[stage], self.backward[stage]) if stage < len(self) else (0, 0)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Operations in order, with what simulating them gives."""

    operations: tuple[Operation, ...]
    makespan: float  # seconds
    peak: float  # of memory, the chain's input included

    @property
    def forwards(self) -> int:
        """Number of forward passes of stages, repetitions included."""
        return sum(op.action.startswith("forward") for op in self.operations)


def simulate(chain: Chain, operations: Sequence[Operation]) -> Schedule:
    """Run a schedule on sizes alone, counting time and memory.

    Raises:
        ValueError: an operation lacks an input, or the schedule doesn't end with the gradient of x_0 and nothing else.
    """
    held: dict[tuple[str, int], float] = {("x", 0): chain.x(0)}
    time, peak = 0.0, chain.x(0)
    for op in operations:
        forward, backward = chain.seconds(op.stage)
        temps = chain.temps(op.stage)
        _require(op, held)
        here = op.stage
        if op.action == "loss":
            held.pop(("x", here), None)
            held["gradient", here] = chain.x(here)
        elif op.action == "backward":
            time += backward
            peak = max(peak, sum(held.values()) + temps[1])
            del held["saved", here], held["gradient", here + 1]
            held.pop(("x", here), None)
            held["gradient", here] = chain.x(here)
        else:
            time += forward
            key = ("saved" if op.action == "forward_save" else "x", here if op.action == "forward_save" else here + 1)
            held[key] = chain.saved(here) if op.action == "forward_save" else chain.x(here + 1)
            peak = max(peak, sum(held.values()) + temps[0])
            if op.action == "forward":
                held.pop(("x", here), None)
        peak = max(peak, sum(held.values()))
    if set(held) != {("gradient", 0)}:
        raise ValueError(f"the schedule ends with {sorted(held)} in memory instead of the gradient of x_0 alone")
    return Schedule(operations=tuple(operations), makespan=time, peak=peak)


def _require(op: Operation, held: dict[tuple[str, int], float]) -> None:
    """That an operation's inputs are in memory: an activation by itself, or as part of what its stage saved."""
    needed = [("saved", op.stage), ("gradient", op.stage + 1)] if op.action == "backward" else []
    missing = [what for what in needed if what not in held]
    if ("x", op.stage) not in held and ("saved", op.stage - 1) not in held:
        missing.append(("x", op.stage))
    if missing:
        raise ValueError(f"{op.action} of stage {op.stage} lacks {', '.join(f'{what} {i}' for what, i in missing)}")


def save_everything(chain: Chain) -> Schedule:
    """The schedule without rematerialisation: the fastest, with the most memory."""
    stages = range(len(chain))
    forwards = [Operation("forward_save", i) for i in stages]
    backwards = [Operation("backward", i) for i in reversed(stages)]
    return simulate(chain, [*forwards, Operation("loss", len(chain)), *backwards])


def _numbers(name: str, values: Iterable[float]) -> tuple[float, ...]:
    """Plain numbers of a sequence or an array; whole ones stay whole."""
    try:
        found = [value.item() if hasattr(value, "item") else value for value in values]  # type: ignore[attr-defined]
        return tuple(value if isinstance(value, int) else float(value) for value in found)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is a sequence of numbers, one a stage, not {values!r}") from None


def _check(name: str, values: Sequence[float]) -> None:
    for index, value in enumerate(values):
        if not (isfinite(value) and value >= 0):
            raise ConfigError(f"{name}[{index}] is a number from 0, not {value}")
