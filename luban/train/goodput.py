"""Where the seconds of a run go: each belongs to one of six kinds, so that they add up to the wall clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

KINDS = {
    "compute": "forward and backward passes, updates, validation",
    "communication": "waiting in collectives (on a GPU those that overlap count as compute)",
    "data": "waiting for batches; in reinforcement learning, making rounds of answers",
    "checkpoint": "copying the state, and waiting until it is written",
    "lost": "steps that were done again, and recovery from failures",
    "idle": "start, waiting for workers, and the end",
}
KEPT = 256  # step boundaries that a run may go back to


class Goodput:
    """Seconds of this process since it was made, by kind.

    Args:
        doing: the kind that the time until the first change belongs to.
        clock: monotonic seconds.
    """

    def __init__(self, doing: str = "idle", clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.doing = doing
        self.step: int | None = None  # the last that has finished since this was made
        self.began = self.since = clock()  # `since`: the last change of what it does, a sign of progress
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._steps: deque[tuple[int, dict[str, float]]] = deque(maxlen=KEPT)

    def enter(self, kind: str) -> None:
        """From now on time belongs to `kind`."""
        now = self.clock()
        self._seconds[self.doing] += now - self.since
        self.doing, self.since = kind, now

    @contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Inside of this block time belongs to `kind`."""
        before = self.doing
        self.enter(kind)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """By kind, up to now."""
        found = dict(self._seconds)
        found[self.doing] += self.clock() - self.since
        return found

    def finished(self, step: int) -> None:
        """A step is kept from here on."""
        self._steps.append((step, self.seconds()))

    def go_back(self, step: int) -> None:
        """What was done after this step, or after the start where it isn't known, was lost."""
        now = self.seconds()
        kept = next((seconds for at, seconds in reversed(self._steps) if at == step), None)
        kept = kept or {kind: 0.0 if kind != "idle" else now["idle"] for kind in KINDS}
        gone = sum(now.values()) - sum(kept.values())
        self._seconds = {**kept, "lost": kept["lost"] + gone}
        self._steps = deque((mark for mark in self._steps if mark[0] <= step), maxlen=KEPT)
        self.since = self.clock()

    def lose_all(self) -> None:
        """What was done so far was recovery: this process takes the place of a lost one."""
        now = self.seconds()
        self._seconds = {**dict.fromkeys(KINDS, 0.0), "lost": sum(now.values())}
        self.since = self.clock()


def added(*ledgers: Mapping[str, float]) -> dict[str, float]:
    """Seconds by kind of several sessions or processes together."""
    return {kind: sum(ledger.get(kind, 0.0) for ledger in ledgers) for kind in KINDS}
