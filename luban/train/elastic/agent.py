"""The agent of a machine: starts the workers of an elastic run and its service, and replaces those that are lost.

It keeps nothing that it couldn't find out again: when it is killed, workers and service go on, and the same command starts
another agent, which takes them over.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luban.core.artifact import read_table, write_json
from luban.core.config import from_dict, to_dict
from luban.core.errors import LubanError, TrainingError, UsageError
from luban.core.log import say
from luban.core.whole_directory import real_path
from luban.train.elastic.claim import REFUSED, TAKEN, claimed, environment_of, life_of, stacks_of
from luban.train.elastic.config import ElasticConfig
from luban.train.elastic.events import in_words
from luban.train.elastic.keeper import POLL, ServiceKeeper, Start, start_process
from luban.train.elastic.processes import Process
from luban.train.elastic.service import SETTINGS, ServiceSettings, read_settings
from luban.train.elastic.shared_memory import flash_base, remove_flash

STACKS_SECONDS = 1.0  # that a worker which hangs gets to write down its stacks
GRACE = 60.0  # seconds that workers get to save and end
QUICK = 5.0  # seconds of them about which nothing is said
START_SECONDS = 120.0  # that a process gets until its first heartbeat
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def folder_of(out: Path) -> Path:
    """Where the processes of the run `out` keep what they share: address and database of the service, stacks of workers."""
    out = real_path(out)
    return out.with_name(out.name + ".elastic")


def _record(folder: Path, node: str) -> Path:
    """What an agent was started with, for the next one."""
    return folder / f"agent-{node}.json"


def successor(out: Path, words: Sequence[str]) -> Agent | None:
    """The agent that takes over the workers that one started by the same words has left; None: there are none. It needs neither
    recipe nor data, so that it is there at once."""
    folder = folder_of(out)
    for record in sorted(folder.glob("agent-*.json")):
        with suppress(OSError, LubanError):
            found = read_table(record)
            elastic = from_dict(ElasticConfig, found["elastic"])
            node = elastic.node or socket.gethostname()
            names = [f"{node}/{number}" for number in range(found["workers"])]
            if found["words"] == list(words) and any(claimed(name, folder) for name in names):
                return Agent(words, out, found["workers"], read_settings(folder), elastic)
    return None


@dataclass
class Place:
    """A worker's place on this machine."""

    name: str
    process: Process | None = None
    life: str | None = None  # of the process, once it has begun
    since: float = 0.0  # when it was started
    failures: list[int] = field(default_factory=list)  # the run's step at each failure
    asked: float | None = None  # when a process that hangs was asked for its stacks
    left: bool = False  # its process has ended properly, or won't be replaced


@dataclass
class Shortage:
    """Too few workers for `elastic.min_workers`.

    Args:
        patience: seconds after which the run ends.
        unsaid: seconds in which workers that are expected may still come, about which nothing is said.
    """

    patience: float
    unsaid: float
    since: float | None = None
    said: bool = False

    def look(self, status: dict[str, Any], now: float) -> tuple[str, bool]:
        """What is to be said now, if anything, and whether the run ends with it."""
        ready, fewest, expected = len(status["waiting"]), status["fewest"], status["expected"]
        if status["generation"] or status["ended"] or ready >= fewest:
            self.since, self.said = None, False
            return "", False
        self.since = now if self.since is None else self.since
        missing = f"elastic.min_workers is {fewest}, and {ready} of the {expected} workers of this run are ready"
        if now - self.since > self.patience:
            return (
                f"{missing} after {self.patience:.0f} s: start more, or give --elastic.min_workers {max(ready, 1)}",
                True,
            )
        if self.said or (expected >= fewest and now - self.since < self.unsaid):
            return "", False
        self.said = True
        return f"{missing}: waiting for more, for {self.patience:.0f} s (--elastic.wait_seconds)", False


class Agent:
    """Keeps the workers of one machine running.

    Args:
        words: of the command line, as a worker gets them.
        out: the run directory.
        workers: of this machine.
        start: starts a process of this Python.
    """

    def __init__(
        self,
        words: Sequence[str],
        out: Path,
        workers: int,
        settings: ServiceSettings,
        elastic: ElasticConfig,
        start: Start = start_process,
    ):
        self.words, self.out, self.settings, self.elastic = list(words), Path(out), settings, elastic
        self.node = elastic.node or socket.gethostname()
        self.folder = folder_of(out)
        self.start = start
        self.places = [Place(f"{self.node}/{number}") for number in range(workers)]
        self.service = ServiceKeeper(self.folder, start, elastic.silent_seconds)
        self.spares: list[subprocess.Popen] = []
        self.seen = 0  # events that were told
        self.stopping: int | None = None  # the signal that asked for it
        self.told_to_stop = False
        self.ending_since = 0.0  # since when the workers should end
        self.ending_said = False
        self.short = Shortage(elastic.wait_seconds, elastic.join_seconds)

    def run(self) -> int:
        """Until the run has ended; returns its exit code.

        Raises:
            UsageError: another agent of the same machine works for the run.
            TrainingError: the run failed; the message says why.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self.folder / f"agent-{self.node}.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UsageError(
                    f"{self.node} works for {self.out} already: give --elastic.node another name to add workers, or wait "
                    f"until it has ended"
                ) from None
            write_json(
                _record(self.folder, self.node),
                {"words": self.words, "workers": len(self.places), "elastic": to_dict(self.elastic)},
            )
            before = {number: signal.signal(number, self._ask) for number in SIGNALS}
            try:
                self._begin()
                return self._watch()
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _ask(self, number: int, _frame: object) -> None:
        self.stopping = number

    def _begin(self) -> None:
        """Take over the workers that an agent before has left; without any, begin a session of the run."""
        for place in self.places:
            self._adopt(place)
        if not (self.folder / SETTINGS).exists() or not any(place.process for place in self.places):
            write_json(self.folder / SETTINGS, to_dict(self.settings))
        # without the node's name: an agent counts as one of the run's only when it has begun
        self.service.until_answered("status", since=0)
        if not any(place.process for place in self.places):
            self.service.until_answered("begin", node=self.node)
        self.seen = self.service.until_answered("status", since=0)["event_count"]
        self._take_part(self.places)

    def _take_part(self, places: Sequence[Place]) -> None:
        """Tell the service which workers of this machine take part."""
        numbers = [int(place.name.rpartition("/")[2]) for place in places]
        self.service.until_answered("node", name=self.node, numbers=numbers)

    def _adopt(self, place: Place) -> None:
        found = claimed(place.name, self.folder)
        if found is not None:
            place.process, place.life = found
            place.since = time.monotonic()
            say(f"worker {place.name} goes on")

    def _watch(self) -> int:
        """Replace lost workers until the run has ended."""
        while True:
            status = self.service.ask("status", node=self.node, since=self.seen)
            if status is not None:
                for event in status["events"]:
                    if text := in_words(event):
                        say(text)
                self.seen += len(status["events"])
            if status is not None and self.node in status["failing"] and len(status["nodes"]) > 1:
                self._leave_as_failing()
            self._stop_if_asked(status)
            if status is not None and not self.stopping:
                self._wait_for_others(status)
            self._keep_spares(status)
            ended = (status or {}).get("ended")
            for place in self.places:
                self._update_worker(place, status, ended=ended is not None)
            if not any(place.process for place in self.places):
                if ended is not None:
                    return self._end(ended)
                if self.stopping:
                    return self._stopped(self.stopping)
                if status is not None and all(place.left for place in self.places):
                    return self._given_up(status)
            time.sleep(POLL)

    def _update_worker(self, place: Place, status: dict[str, Any] | None, *, ended: bool) -> None:
        """Start, end or replace a worker, as it needs."""
        if place.process is None:
            if status is not None and not (ended or self.stopping or place.left):
                self._start(place)
            return
        if place.life is None:
            place.life = life_of(place.name, self.folder, place.process.pid)
        if not place.process.alive():
            self._ended(place, status, ended=ended)
            return
        if status is None:
            return
        now = time.monotonic()
        why = None if ended else status["unwell"].get(place.name)
        begun = place.life is not None and status["lives"].get(place.name) == place.life
        if place.asked is not None:
            if now - place.asked > STACKS_SECONDS:
                place.process.signal(signal.SIGKILL)
        elif why is not None and begun:
            what = "sends no heartbeat" if why == "silent" else "hangs"
            say(f"worker {place.name} {what} and is replaced; its stacks: {stacks_of(place.name, self.folder)}")
            place.process.signal(signal.SIGUSR1)  # write down the stacks of all threads
            place.asked = now
        elif self._is_overdue(place, now, begun=begun, ends=ended or self.stopping is not None):
            doing = f"end within {GRACE:.0f}" if self.ending_since else f"begin within {START_SECONDS:.0f}"
            say(f"worker {place.name} did not {doing} s and is killed")
            place.process.signal(signal.SIGKILL)

    def _is_overdue(self, place: Place, now: float, *, begun: bool, ends: bool) -> bool:
        """Whether a worker has taken too long to end, or to send its first heartbeat."""
        if ends:
            self.ending_since = self.ending_since or now
            if not self.ending_said and now - self.ending_since > QUICK:
                self.ending_said = True
                left = [place.name for place in self.places if place.process is not None]
                say(f"waiting for {', '.join(left)} to save and end; killed after {GRACE:.0f} s")
            return now - self.ending_since > GRACE
        return not begun and now - place.since > START_SECONDS

    def _wait_for_others(self, status: dict[str, Any]) -> None:
        """Say that too few workers are there for the run to begin or to go on, and end it when that lasts."""
        message, over = self.short.look(status, time.monotonic())
        if message and not over:
            say(message)
        elif over:
            self.service.until_answered("end", code=1, message=message)

    def _start(self, place: Place) -> None:
        spare = next((spare for spare in self.spares if spare.poll() is None), None)
        if spare is None:
            place.process = Process.of(self._start_process(place.name))
        else:
            assert spare.stdin is not None
            self.spares.remove(spare)
            with suppress(BrokenPipeError):
                spare.stdin.write(place.name.encode() + b"\n")
                spare.stdin.close()
            place.process = Process.of(spare)
        place.life, place.since, place.asked = None, time.monotonic(), None

    def _start_process(self, name: str | None) -> subprocess.Popen:
        threads = str(max((os.cpu_count() or 1) // len(self.places), 1))
        environment = {"OMP_NUM_THREADS": threads, **os.environ, **environment_of(name, self.folder)}
        return self.start(["-m", "luban", *self.words], environment)

    def _keep_spares(self, status: dict[str, Any] | None) -> None:
        """Start spare processes, but not while a lost worker is being replaced, which needs the processor."""
        self.spares = [spare for spare in self.spares if spare.poll() is None]
        if status is None or not status["generation"] or status["ended"] or self.stopping:
            return
        while len(self.spares) < self.elastic.spares:
            self.spares.append(self._start_process(None))

    def _ended(self, place: Place, status: dict[str, Any] | None, *, ended: bool) -> None:
        """A worker's process has ended: properly, for a place that another has, or as a loss."""
        process = place.process
        assert process is not None
        code = process.child.poll() if process.child is not None else None
        if code == TAKEN:
            place.process = None
            self._adopt(place)
            return
        if ended or self.stopping or code in (0, REFUSED):
            place.process, place.left = None, True
            if code == REFUSED:
                self._take_part([place for place in self.places if not place.left])
            return
        if status is None:
            return  # until the service knows
        how = process.ended_how() + (", it had sent no heartbeat or hung" if place.asked is not None else "")
        if place.life is not None and not self.service.told("lost", name=place.name, life=place.life, how=how):
            return
        place.process = None
        step = -1 if status["step"] is None else status["step"]
        place.failures = [*(at for at in place.failures if at == step), step]
        if len(place.failures) >= self.elastic.restarts:
            place.left = True
            self._give_up(place, how)

    def _give_up(self, place: Place, how: str) -> None:
        """Replace a worker no more that fails again and again."""
        say(f"worker {place.name} has failed {len(place.failures)} times in the same step ({how}) and is not replaced")
        self.service.until_answered("event", kind="given up", who=place.name, how=how)
        self._take_part([place for place in self.places if not place.left])

    def _leave_as_failing(self) -> None:
        """The workers of this machine fail, and those of no other: it takes part no more."""
        self.service.until_answered("event", kind="node fails", who=self.node, why="its workers fail and no others do")
        for place in self.places:
            place.left = True
        self._take_part([])

    def _stopped(self, number: int) -> int:
        """All workers have ended after a signal. Without other machines their copies may be the newest state of the run, which
        the same command goes on from."""
        self._end_spares()
        status = self.service.ask("status", since=self.seen)
        if status is not None and status["ended"] is not None:  # since the last question
            return self._end(status["ended"])
        if status is not None and set(status["nodes"]) - {self.node}:
            self._remove_copies()
        return 128 + number

    def _remove_copies(self) -> None:
        """Free the memory of this machine's copies, which others go on without."""
        remove_flash(flash_base(self.elastic.flash_folder, self.out) / self.node)

    def _given_up(self, status: dict[str, Any]) -> int:
        if status["nodes"]:
            self._remove_copies()
            return 1
        message = "no worker is left: each has failed again and again in the same step"
        self.service.until_answered("end", code=1, message=message)
        raise TrainingError(message)

    def _stop_if_asked(self, status: dict[str, Any] | None) -> None:
        """After a signal: let the workers save and end; where other machines go on, let this one leave."""
        if not self.stopping or self.told_to_stop or status is None:
            return
        self.told_to_stop = True
        if set(status["nodes"]) - {self.node}:
            self._take_part([])
            return
        for place in self.places:
            if place.process is not None:
                place.process.signal(self.stopping)

    def _end(self, ended: dict[str, Any]) -> int:
        """The run has ended for all: free what it held."""
        self._end_spares()
        remove_flash(flash_base(self.elastic.flash_folder, self.out))
        self.service.signal(signal.SIGTERM)
        if ended["code"] == 0:
            return 0
        failure = LubanError(ended["message"])
        failure.exit_code = ended["code"]
        raise failure

    def _end_spares(self) -> None:
        for spare in self.spares:
            spare.kill()
            spare.wait()
