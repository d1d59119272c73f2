"""Every process sends a heartbeat, and learns which one doesn't, or which one is stuck: without it a process that waits for
another that is stopped, swapped out, cut off or in an endless loop would wait until the collective's timeout."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from luban.parallel.standstill import Activity, Judge, Observer, Standing, main_stack, report

BEAT = 1.0  # seconds between two heartbeats
SILENT = 20.0  # seconds without one after which a process counts as lost
TAKEN = 3  # beats within which the others have read what the first process found
END = "end"  # a process's last heartbeat: it needs nothing more from the others


def _leave(message: str) -> None:
    """End this process from a thread, while the main one may be inside of a collective that never ends."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


@contextmanager
def watched(
    store: dist.Store | None,
    rank: int,
    size: int,
    *,
    activity: Activity | None = None,
    hang: float = 0.0,
    leave: Callable[[str], None] = _leave,
    beat: float = BEAT,
    silent: float = SILENT,
) -> Iterator[None]:
    """While this is open, the process gives signs of life, and ends if another has none left or is stuck.

    Args:
        store: that all processes share; None: there are no others.
        activity: of this process.
        hang: seconds in which no process gets on after which those that the others wait for count as stuck (0: never).
        leave: called with a message that names the lost or stuck process.
        beat, silent: seconds.
    """
    if store is None or size == 1:
        yield
        return
    observer = Observer(activity, beat) if activity is not None and hang else None
    heart = Heart(store.clone(), rank, size, leave, beat, silent, observer, hang)  # type: ignore[attr-defined]
    threads = [
        threading.Thread(target=work, daemon=True, name=name)
        for name, work in (("heartbeat", heart.run), ("heartbeat-store", heart.watch_store))
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        heart.stop.set()
        for thread in threads:
            thread.join(timeout=2 * beat)


class Heart:
    """One process's signs, and its watch: the first process watches all, the others watch it and read what it found.

    The store is in the first process (under torchrun beside it). While that is stopped, whoever asks the store waits without
    end, so that a second thread checks that answers still come.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        leave: Callable[[str], None],
        beat: float,
        silent: float,
        observer: Observer | None = None,
        hang: float = 0.0,
    ):
        self.store, self.rank, self.size = store, rank, size
        self.leave, self.beat, self.silent = leave, beat, silent
        self.observer, self.judge = observer, Judge(size, hang)
        self.standings: dict[int, Standing] = {}  # of the processes that tell how far they are, in the first one
        self.stop = threading.Event()
        # process → its last sign, and for how many beats it has had no other: in beats, so that the time in which this process
        # itself was stopped doesn't count
        self.seen: dict[int, tuple[bytes, int]] = {}
        self.answers = 0  # of the store
        self.beating = True

    def run(self) -> None:
        """Until `stop`."""
        count = 0
        try:
            while not self.stop.wait(self.beat):
                count += 1
                self.store.set(self._key(self.rank), self._sign(count))
                lost = self.look_around()
                self.answers += 1
                if lost is not None:
                    self._tell("lost", str(lost))
                    self.leave(self._message(lost))
                    return
                if (message := self._stuck()) is not None:
                    self.leave(message)
                    return
            self.store.set(self._key(self.rank), END)
        except (RuntimeError, dist.DistError):  # the store is the first process's, and is gone with it
            if not self.stop.wait(self.silent):
                self.leave(self._message(0))
        finally:
            self.beating = False

    def watch_store(self) -> None:
        """Until `stop`, or until the store has been silent for too long."""
        last, silent = -1, 0  # silent: beats, as in `seen`
        while not self.stop.wait(self.beat) and self.beating:
            last, silent = self.answers, 0 if self.answers != last else silent + 1
            if silent * self.beat > self.silent:
                self.leave(self._message(0))
                return

    def look_around(self) -> int | None:
        """One look at the others, once a beat: a process that has been silent for too long."""
        if self.rank and self.store.check(["lost"]):
            return int(self.store.get("lost"))
        for other in range(1, self.size) if self.rank == 0 else (0,):
            sign = self.store.get(self._key(other)) if self.store.check([self._key(other)]) else b""
            last, silent = self.seen.get(other, (None, 0))
            silent = silent + 1 if sign == last else 0
            self.seen[other] = sign, silent
            if sign != END.encode() and silent * self.beat > self.silent:
                return other
        return None

    def _sign(self, count: int) -> str:
        """The count of heartbeats, and how far the process is where it tells."""
        if self.observer is None:
            return str(count)
        standing = self.observer.look()
        if self.rank == 0:
            self.standings[0] = standing
        return f"{count} {standing.encoded()}"

    def _stuck(self) -> str | None:
        """What to say if some process is stuck: the first process finds out, and says where all stand; those that are stuck say
        how they came there."""
        if self.observer is None:
            return None
        if self.rank:
            if not self.store.check(["stuck"]):
                return None
            found = json.loads(self.store.get("stuck"))
        else:
            for rank, (sign, _) in self.seen.items():
                _, _, standing = sign.partition(b" ")
                if standing:
                    self.standings[rank] = Standing(**json.loads(standing))
            found = self.judge.stuck(self.standings)
            if not found:
                return None
            self._tell("stuck", json.dumps(found))
        parts = [report(self.standings, found)] if self.rank == 0 else []
        if self.rank in found:
            parts.append(f"luban: process {self.rank} of {self.size} is stuck here:\n{main_stack()}")
        return "\n".join(parts) or f"luban: process {self.rank} of {self.size} ends, as process {found[0]} is stuck"

    def _tell(self, what: str, found: str) -> None:
        """Let the other processes read what was found, before the store ends with the first one."""
        self.store.set(what, found)
        if self.rank == 0:
            self.stop.wait(TAKEN * self.beat)

    def _message(self, lost: int) -> str:
        return (
            f"luban: process {lost} of {self.size} has sent no heartbeat for {self.silent:.0f} seconds, so that process "
            f"{self.rank} ends. The same command goes on from the last checkpoint"
        )

    def _key(self, rank: int) -> str:
        return f"alive/{rank}"
