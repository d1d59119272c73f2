"""Processes that are alive but stuck (in an endless loop, in a read of a dead disk) while the others wait for them.

With its heartbeat every process says how far it is and where its main thread stands. When nobody has got on for too long, those
that don't wait in a collective are the ones that the others wait for.
"""

from __future__ import annotations

import json
import linecache
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

PATIENCE = 10  # times the longest pause so far, within which a pause is nothing unusual
SHOWN = 8  # processes that a message lists, at most
EXCUSED = ("idle", "checkpoint")  # starting, ending and writing take as long as a disk takes
PACKAGE = str(Path(__file__).parents[1])
BETWEEN = ("torch/_ops.py", "torch/utils/_contextlib.py", "torch/_compile.py")  # frames of which the caller tells more
WAITS = ("torch/distributed/", "torch/cuda/")
WAITING_CALLS = (".wait(", ".synchronize(", "wait_tensor(")  # of compiled code, which has no frame of its own
COMPILERS = ("torch/_dynamo/", "torch/_inductor/", "triton/compiler/", "triton/runtime/")


class Activity(Protocol):
    """What a process does, read by the thread of its heartbeat."""

    doing: str  # one of `luban.train.goodput.KINDS`
    since: float  # when that changed last, on any clock
    step: int | None  # the last one that has finished since the process started; None: none


@dataclass(frozen=True)
class Standing:
    """How far a process is."""

    step: int | None
    doing: str
    still: float  # seconds since it got on
    where: str  # in Python
    waits: bool  # for other processes, or for the device
    excused: bool  # what it does may take long

    def encoded(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Position:
    """Where a thread stands."""

    # functions that call each other, outermost first: file and line, of the innermost the line where it begins
    chain: tuple[tuple[str, int], ...]
    where: str
    waits: bool
    compiles: bool


def position_of(innermost: FrameType | None) -> Position:
    """Of a thread, from its innermost Python frame."""
    frames: list[FrameType] = []
    while innermost is not None:
        frames.append(innermost)
        innermost = innermost.f_back
    names = [frame.f_code.co_filename.replace("\\", "/") for frame in frames]
    told = next((k for k, name in enumerate(names) if not name.endswith(BETWEEN)), 0)
    line = linecache.getline(frames[told].f_code.co_filename, frames[told].f_lineno or 0)  # some instructions have none
    own = next((k for k, name in enumerate(names) if name.startswith(PACKAGE)), min(told + 1, len(names) - 1))
    places = [_place(frames[k]) for k in dict.fromkeys((own, told))]
    return Position(
        chain=tuple(
            (name, frame.f_lineno if k else frame.f_code.co_firstlineno)
            for k, (name, frame) in enumerate(zip(names, frames, strict=True))
        )[::-1],
        where=", which called ".join(places),
        waits=any(part in names[told] for part in WAITS) or any(call in line for call in WAITING_CALLS),
        compiles=any(part in name for name in names for part in COMPILERS),
    )


def _place(frame: FrameType) -> str:
    name = "/".join(Path(frame.f_code.co_filename).parts[-3:])
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


def main_frame() -> FrameType | None:
    """The innermost Python frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def main_stack() -> str:
    """The Python stack of the main thread, the outermost call first."""
    return "".join(traceback.format_stack(main_frame()))


class Observer:
    """Looks at this process once a beat. Pauses are counted in beats, so that time in which the process itself was stopped doesn't
    count.

    Args:
        beat: seconds between two looks.
    """

    def __init__(self, activity: Activity, beat: float):
        self.activity, self.beat = activity, beat
        self.sign: tuple[object, ...] = ()
        self.seen: set[tuple[tuple[str, int], ...]] = set()  # since the last sign of progress
        self.beats = 0  # without a sign of progress

    def look(self) -> Standing:
        """One look: another step, another kind of work or a call that wasn't seen before means that it gets on."""
        activity, position = self.activity, position_of(main_frame())
        step, doing = activity.step, activity.doing
        sign = (step, doing, activity.since)
        if sign != self.sign:
            self.seen.clear()
        self.beats = self.beats + 1 if position.chain in self.seen else 0
        self.seen.add(position.chain)
        self.sign = sign
        return Standing(
            step=step,
            doing=doing,
            still=self.beats * self.beat,
            where=position.where,
            waits=position.waits or doing == "communication",
            excused=doing in EXCUSED or position.compiles,
        )


class Judge:
    """Decides when all processes have stood still for too long.

    Args:
        size: processes of the run.
        hang: seconds.
    """

    def __init__(self, size: int, hang: float):
        self.size, self.hang = size, hang
        self.pause = self.longest = 0.0  # seconds: the pause that lasts, and the longest that has ended

    def stuck(self, standings: Mapping[int, Standing]) -> list[int]:
        """The processes that the others wait for, if for `hang` seconds and for ten times the longest pause so far none has got on;
        all of them where all wait for each other. Else none, as in the first step, which shows how long one takes."""
        every = standings.values()
        known = len(standings) == self.size and not any(one.excused for one in every)
        still = min(one.still for one in every) if known else 0.0
        if still < self.pause:
            self.longest = max(self.longest, self.pause)
        self.pause = still
        if any(one.step is None for one in every) or still <= max(self.hang, PATIENCE * self.longest):
            return []
        return [rank for rank, one in sorted(standings.items()) if not one.waits] or sorted(standings)


def report(standings: Mapping[int, Standing], found: list[int]) -> str:
    """What to say of it: who stands where."""
    size, still = len(standings), min(one.still for one in standings.values())
    named = ", ".join(map(str, found[:SHOWN])) + f" and {len(found) - SHOWN} more" * (len(found) > SHOWN)
    if len(found) < size:
        what = f"process{'es' * (len(found) > 1)} {named} of {size} {'are' if len(found) > 1 else 'is'} stuck, and the others wait"
    else:
        what = f"all {size} processes wait for each other"
    rows = [f"luban: {what}: none has got on for {still:.0f} seconds (train.hang_seconds)"]
    others = [rank for rank in standings if rank not in found]
    for rank in [*found, *others][:SHOWN]:
        one = standings[rank]
        rows.append(f"  process {rank}, {one.doing} behind step {one.step}: {one.where}")
    rows.append("The same command goes on from the last checkpoint")
    return "\n".join(rows)
