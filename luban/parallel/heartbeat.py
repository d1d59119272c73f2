"""Every process sends a heartbeat, and learns which one doesn't: without it a process that waits for another that is
stopped, swapped out or cut off would wait until the collective's timeout."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

BEAT = 1.0  # seconds between two heartbeats
SILENT = 20.0  # seconds without one after which a process counts as lost
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
    leave: Callable[[str], None] = _leave,
    beat: float = BEAT,
    silent: float = SILENT,
) -> Iterator[None]:
    """While this is open, the process gives signs of life, and ends if another has none left.

    Args:
        store: that all processes share; None: there are no others.
        leave: called with a message that names the lost process.
        beat, silent: seconds.
    """
    if store is None or size == 1:
        yield
        return
    heart = Heart(store.clone(), rank, size, leave, beat, silent)  # type: ignore[attr-defined]
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
        self, store: dist.Store, rank: int, size: int, leave: Callable[[str], None], beat: float, silent: float
    ):
        self.store, self.rank, self.size = store, rank, size
        self.leave, self.beat, self.silent = leave, beat, silent
        self.stop = threading.Event()
        self.seen: dict[int, tuple[bytes, float]] = {}  # process → its last sign, and when it was new here
        self.answers = 0  # of the store
        self.beating = True

    def run(self) -> None:
        """Until `stop`."""
        count = 0
        try:
            while not self.stop.wait(self.beat):
                count += 1
                self.store.set(self._key(self.rank), str(count))
                lost = self._lost()
                self.answers += 1
                if lost is not None:
                    self.store.set("lost", str(lost))
                    self.leave(self._message(lost))
                    return
            self.store.set(self._key(self.rank), END)
        except (RuntimeError, dist.DistError):  # the store is the first process's, and is gone with it
            if not self.stop.wait(self.silent):
                self.leave(self._message(0))
        finally:
            self.beating = False

    def watch_store(self) -> None:
        """Until `stop`, or until the store has been silent for too long."""
        last, silent = -1, 0  # silent: beats, so that the time in which this process itself was stopped doesn't count
        while not self.stop.wait(self.beat) and self.beating:
            last, silent = self.answers, 0 if self.answers != last else silent + 1
            if silent * self.beat > self.silent:
                self.leave(self._message(0))
                return

    def _lost(self) -> int | None:
        """A process that has been silent for too long."""
        if self.rank and self.store.check(["lost"]):
            return int(self.store.get("lost"))
        now = time.monotonic()
        for other in range(1, self.size) if self.rank == 0 else (0,):
            sign = self.store.get(self._key(other)) if self.store.check([self._key(other)]) else b""
            last, since = self.seen.get(other, (None, now))
            if sign != last:
                self.seen[other] = sign, now
            elif sign != END.encode() and now - since > self.silent:
                return other
        return None

    def _message(self, lost: int) -> str:
        return (
            f"luban: process {lost} of {self.size} has sent no heartbeat for {self.silent:.0f} seconds, so that process "
            f"{self.rank} ends. The same command goes on from the last checkpoint"
        )

    def _key(self, rank: int) -> str:
        return f"alive/{rank}"
