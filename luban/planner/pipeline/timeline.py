"""A schedule in time: when each action runs, how long processes wait, how many inputs they keep, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from luban.core.pipeline_order import Action, Kind, Table

UNITS: Mapping[Kind, int] = {"F": 1, "B": 2, "I": 1, "W": 1}  # time of each kind of action
CELL = 3  # characters of a picture a unit of time


@dataclass(frozen=True)
class Timeline:
    """Start of every action, when each begins as soon as the process is free and what it needs has come."""

    table: Table
    starts: Mapping[Action, int]
    units: Mapping[Kind, int]

    @property
    def length(self) -> int:
        """From the first start to the last end."""
        return max(start + self.units[action.kind] for action, start in self.starts.items())

    def bubble(self) -> Fraction:
        """Time that processes wait, as a share of the time that they work (its mean over the processes)."""
        work = sum(self.units[action.kind] for action in self.starts)
        return Fraction(self.length * len(self.table), work) - 1

    def peak_stash(self) -> list[int]:
        """For each process the most inputs of stages that it keeps at once for backward passes to come."""
        found = []
        for actions in self.table:
            held = peak = 0
            for action in actions:
                held += {"F": 1, "B": -1, "W": -1, "I": 0}[action.kind]
                peak = max(peak, held)
            found.append(peak)
        return found

    def picture(self) -> list[str]:
        """A line a process: F and the micro-batch in its forward, B in its backward pass (I and W where that is split)."""
        lines = []
        for process, actions in enumerate(self.table):
            line = [" " * CELL] * self.length
            for action in actions:
                start, units = self.starts[action], self.units[action.kind]
                letter = action.kind if action.stage < len(self.table) else action.kind.lower()
                line[start : start + units] = [f"{letter}{action.micro_batch}"[:CELL].ljust(CELL, "·")] * units
            lines.append(f"process {process:<3} " + "".join(line).rstrip())
        return lines


def needs(action: Action, stages: int) -> Action | None:
    """The action whose result this one waits for."""
    kind, stage, m = action
    if kind == "F":
        return Action("F", stage - 1, m) if stage else None
    if kind == "W":
        return Action("I", stage, m)
    return Action(kind, stage + 1, m) if stage + 1 < stages else Action("F", stage, m)


def timeline(table: Table, stages: int, units: Mapping[Kind, int] = UNITS) -> Timeline:
    """Run a table. Raises ValueError for one that can't run: an action waits for one that never comes before it."""
    ends: dict[Action, int] = {}
    starts: dict[Action, int] = {}
    at, free = [0] * len(table), [0] * len(table)
    while any(place < len(actions) for place, actions in zip(at, table, strict=True)):
        moved = False
        for process, actions in enumerate(table):
            while at[process] < len(actions):
                action = actions[at[process]]
                before = needs(action, stages)
                if before is not None and before not in ends:
                    break
                starts[action] = max(free[process], 0 if before is None else ends[before])
                ends[action] = free[process] = starts[action] + units[action.kind]
                at[process] += 1
                moved = True
        if not moved:
            waiting = [str(actions[place]) for place, actions in zip(at, table, strict=True) if place < len(actions)]
            raise ValueError(f"the schedule can't go on: {', '.join(waiting)} wait for each other")
    return Timeline(table, starts, units)
