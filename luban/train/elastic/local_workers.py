"""The worker processes of one machine: started, watched, replaced and ended. Its agent says when."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luban.core.log import say
from luban.train.elastic.claim import REFUSED, TAKEN, claimed, environment_of, incarnation_of, stacks_of
from luban.train.elastic.config import ElasticConfig
from luban.train.elastic.processes import Process
from luban.train.elastic.service_supervisor import ServiceSupervisor, Start

STACKS_SECONDS = 1.0  # that a worker which hangs gets to write down its stacks
GRACE = 60.0  # seconds that workers get to save and end
QUICK = 5.0  # seconds of them about which nothing is said
START_SECONDS = 120.0  # that a process gets until its first heartbeat


@dataclass
class WorkerSlot:
    """A worker's slot on this machine."""

    name: str
    process: Process | None = None
    incarnation: str | None = None  # of the process, once it has begun
    since: float = 0.0  # when it was started
    failures: list[int] = field(default_factory=list)  # the run's step at each failure
    asked: float | None = None  # when a process that hangs was asked for its stacks
    left: bool = False  # its process has ended properly, or won't be replaced


class LocalWorkers:
    """The workers of a machine and its spare processes.

    Args:
        words: of the command line, as a worker gets them.
        folder: that the processes of the run share.
        node: the machine's name.
        count: of workers.
        start: starts a process of this Python.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        node: str,
        count: int,
        elastic: ElasticConfig,
        service: ServiceSupervisor,
        start: Start,
    ):
        self.words, self.folder, self.node, self.elastic = list(words), folder, node, elastic
        self.service, self.start = service, start
        self.slots = [WorkerSlot(f"{node}/{number}") for number in range(count)]
        self.spares: list[subprocess.Popen] = []
        self.ending_since = 0.0  # since when the workers should end
        self.ending_said = False

    def running(self) -> list[WorkerSlot]:
        """Slots with a process."""
        return [slot for slot in self.slots if slot.process is not None]

    def adopt(self) -> None:
        """Take over the processes that an agent before has left."""
        for slot in self.slots:
            self._adopt(slot)

    def take_part(self) -> None:
        """Tell the service which workers of this machine take part."""
        numbers = [int(slot.name.rpartition("/")[2]) for slot in self.slots if not slot.left]
        self.service.until_answered("node", name=self.node, numbers=numbers)

    def leave(self) -> None:
        """The machine takes part no more, and none of its workers is replaced."""
        for slot in self.slots:
            slot.left = True
        self.take_part()

    def signal(self, number: int) -> None:
        """Send a signal to all."""
        for slot in self.running():
            assert slot.process is not None
            slot.process.signal(number)

    def update(self, slot: WorkerSlot, status: dict[str, Any] | None, *, ended: bool, stopping: bool) -> None:
        """Start, end or replace a worker, as it needs."""
        if slot.process is None:
            if status is not None and not (ended or stopping or slot.left):
                self._start(slot)
            return
        if slot.incarnation is None:
            slot.incarnation = incarnation_of(slot.name, self.folder, slot.process.pid)
        if not slot.process.alive():
            self._ended(slot, status, ends=ended or stopping)
            return
        if status is None:
            return
        now = time.monotonic()
        why = None if ended else status["unwell"].get(slot.name)
        begun = slot.incarnation is not None and status["incarnations"].get(slot.name) == slot.incarnation
        if slot.asked is not None:
            if now - slot.asked > STACKS_SECONDS:
                slot.process.signal(signal.SIGKILL)
        elif why is not None and begun:
            what = "sends no heartbeat" if why == "silent" else "hangs"
            say(f"worker {slot.name} {what} and is replaced; its stacks: {stacks_of(slot.name, self.folder)}")
            slot.process.signal(signal.SIGUSR1)  # write down the stacks of all threads
            slot.asked = now
        elif self._is_overdue(slot, now, begun=begun, ends=ended or stopping):
            doing = f"end within {GRACE:.0f}" if self.ending_since else f"begin within {START_SECONDS:.0f}"
            say(f"worker {slot.name} did not {doing} s and is killed")
            slot.process.signal(signal.SIGKILL)

    def keep_spares(self, status: dict[str, Any] | None, *, stopping: bool) -> None:
        """Start spare processes, but not while a lost worker is being replaced, which needs the processor."""
        self.spares = [spare for spare in self.spares if spare.poll() is None]
        if status is None or not status["generation"] or status["ended"] or stopping:
            return
        while len(self.spares) < self.elastic.spares:
            self.spares.append(self._start_process(None))

    def end_spares(self) -> None:
        """Kill them."""
        for spare in self.spares:
            spare.kill()
            spare.wait()

    def _adopt(self, slot: WorkerSlot) -> None:
        found = claimed(slot.name, self.folder)
        if found is not None:
            slot.process, slot.incarnation = found
            slot.since = time.monotonic()
            say(f"worker {slot.name} goes on")

    def _is_overdue(self, slot: WorkerSlot, now: float, *, begun: bool, ends: bool) -> bool:
        """Whether a worker has taken too long to end, or to send its first heartbeat."""
        if ends:
            self.ending_since = self.ending_since or now
            if not self.ending_said and now - self.ending_since > QUICK:
                self.ending_said = True
                left = [slot.name for slot in self.slots if slot.process is not None]
                say(f"waiting for {', '.join(left)} to save and end; killed after {GRACE:.0f} s")
            return now - self.ending_since > GRACE
        return not begun and now - slot.since > START_SECONDS

    def _start(self, slot: WorkerSlot) -> None:
        spare = next((spare for spare in self.spares if spare.poll() is None), None)
        if spare is None:
            slot.process = Process.of(self._start_process(slot.name))
        else:
            assert spare.stdin is not None
            self.spares.remove(spare)
            with suppress(BrokenPipeError):
                spare.stdin.write(slot.name.encode() + b"\n")
                spare.stdin.close()
            slot.process = Process.of(spare)
        slot.incarnation, slot.since, slot.asked = None, time.monotonic(), None

    def _start_process(self, name: str | None) -> subprocess.Popen:
        threads = str(max((os.cpu_count() or 1) // len(self.slots), 1))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **environment_of(name, self.folder)}
        return self.start(["-m", "luban", *self.words], environment)

    def _ended(self, slot: WorkerSlot, status: dict[str, Any] | None, *, ends: bool) -> None:
        """A worker's process has ended: properly, for a slot that another has, or as a loss."""
        process = slot.process
        assert process is not None
        code = process.child.poll() if process.child is not None else None
        if code == TAKEN:
            slot.process = None
            self._adopt(slot)
            return
        if ends or code in (0, REFUSED):
            slot.process, slot.left = None, True
            if code == REFUSED:
                self.take_part()
            return
        if status is None:
            return  # until the service knows
        how = process.ended_how() + (", it had sent no heartbeat or hung" if slot.asked is not None else "")
        if slot.incarnation is not None and not self.service.told(
            "lost", name=slot.name, incarnation=slot.incarnation, how=how
        ):
            return
        slot.process = None
        step = -1 if status["step"] is None else status["step"]
        slot.failures = [*(at for at in slot.failures if at == step), step]
        if len(slot.failures) >= self.elastic.restarts:
            slot.left = True
            self._give_up(slot, how)

    def _give_up(self, slot: WorkerSlot, how: str) -> None:
        """Replace a worker no more that fails again and again."""
        say(f"worker {slot.name} has failed {len(slot.failures)} times in the same step ({how}) and is not replaced")
        self.service.report("given up", slot.name, how=how)
        self.take_part()
