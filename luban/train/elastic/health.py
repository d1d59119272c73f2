"""Workers that are slow, hang, or are silent, told apart by what they report. Pure Python."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

WINDOW = 20  # steps that a median is of
SLOW = 1.5  # a straggler's median step time over that of the others
SECONDS = 0.05  # that a straggler's step takes longer at least: shorter ones vary by the machine's other work
ENOUGH = 10  # steps before anyone is called slow
WAITING = ("communication", "idle")  # in which a worker waits for others


@dataclass
class StepTimes:
    """Seconds that workers computed in their last steps, without waiting for each other."""

    of: dict[str, deque[float]] = field(default_factory=dict)

    def add(self, worker: str, seconds: float) -> None:
        """Of one more step."""
        self.of.setdefault(worker, deque(maxlen=WINDOW)).append(seconds)

    def keep(self, workers: Iterable[str]) -> None:
        """Forget all others."""
        wanted = set(workers)
        self.of = {worker: times for worker, times in self.of.items() if worker in wanted}

    def stragglers(self) -> dict[str, float]:
        """Worker → its median over the median of the others' medians, of those that are slow."""
        medians = {worker: statistics.median(times) for worker, times in self.of.items() if len(times) >= ENOUGH}
        found = {}
        for worker, median in medians.items():
            others = [other for name, other in medians.items() if name != worker]
            usual = statistics.median(others) if others else median
            if median > SLOW * usual and median - usual > SECONDS:
                found[worker] = median / usual
        return found


@dataclass(frozen=True)
class Beat:
    """What a worker said last."""

    at: float  # when it was heard, in seconds
    doing: str  # compute, communication, data, checkpoint, lost or idle
    for_seconds: float  # that it has done so without a sign of progress
    collectives: int = 0  # that it has begun


def unwell(beats: Mapping[str, Beat], now: float, *, silent: float, hang: float) -> dict[str, str]:
    """Worker → "silent" or "hangs", of those that must be replaced.

    One that waits for others does not hang: they do. Where a pass waits in collectives of its own (sharded parameters), those
    that have begun the fewest are the ones that the others wait for.
    """
    found = {worker: "silent" for worker, beat in beats.items() if now - beat.at > silent}
    still = {
        worker: beat.collectives
        for worker, beat in beats.items()
        if worker not in found and beat.doing not in WAITING and beat.for_seconds + now - beat.at > hang
    }
    return found | {worker: "hangs" for worker, begun in still.items() if begun == min(still.values())}


def all_wait(beats: Mapping[str, Beat], now: float, hang: float) -> bool:
    """Whether every worker has waited in collectives for others for too long: messages were lost between them."""
    return bool(beats) and all(
        beat.doing == "communication" and beat.for_seconds + now - beat.at > hang for beat in beats.values()
    )


def failing_node(failures: Mapping[str, list[float]], now: float, *, most: int, within: float) -> list[str]:
    """Nodes whose workers have failed `most` times in the last seconds while no other node's worker has: the machine fails,
    not the program."""
    recent = {node: sum(now - at < within for at in times) for node, times in failures.items()}
    return [
        node
        for node, count in recent.items()
        if count >= most and len(recent) > 1 and not any(n for other, n in recent.items() if other != node)
    ]
