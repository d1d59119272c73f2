"""The agent of a machine: keeps the workers of an elastic run and its service running until the run has ended.

It keeps nothing that it couldn't find out again: when it is killed, workers and service go on, and the same command starts
another agent, which takes them over.
"""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from luban.core.artifact import read_table, write_json
from luban.core.config import from_dict, to_dict
from luban.core.errors import LubanError, TrainingError, UsageError
from luban.core.log import say
from luban.core.whole_directory import real_path
from luban.train.elastic.claim import claimed
from luban.train.elastic.config import ElasticConfig, node_of
from luban.train.elastic.events import in_words
from luban.train.elastic.local_workers import LocalWorkers
from luban.train.elastic.service import SETTINGS, ServiceSettings, read_settings
from luban.train.elastic.service_supervisor import POLL, ServiceSupervisor, Start, start_process
from luban.train.elastic.shared_memory import flash_base, remove_flash
from luban.train.elastic.shortage import Shortage

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
            names = [f"{node_of(elastic)}/{number}" for number in range(found["workers"])]
            if found["words"] == list(words) and any(claimed(name, folder) for name in names):
                return Agent(words, out, found["workers"], read_settings(folder), elastic)
    return None


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
        self.node = node_of(elastic)
        self.folder = folder_of(out)
        self.service = ServiceSupervisor(self.folder, start, elastic.silent_seconds)
        self.workers = LocalWorkers(self.words, self.folder, self.node, workers, elastic, self.service, start)
        self.seen = 0  # events that were told
        self.stopping: int | None = None  # the signal that asked for it
        self.told_to_stop = False
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
                {"words": self.words, "workers": len(self.workers.slots), "elastic": to_dict(self.elastic)},
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
        self.workers.adopt()
        if not (self.folder / SETTINGS).exists() or not self.workers.running():
            write_json(self.folder / SETTINGS, to_dict(self.settings))
        # without the node's name: an agent counts as one of the run's only when it has begun
        self.service.until_answered("status", since=0)
        if not self.workers.running() and not self._begin_session():
            return
        self.seen = self.service.until_answered("status", since=0)["event_count"]
        self.workers.take_part()

    def _begin_session(self) -> bool:
        """Begin a session, or find the one that other machines are in; whether this machine takes part and wasn't asked to stop
        before."""
        said = False
        while left := self.service.until_answered("begin", node=self.node):
            if self.stopping:
                return False
            if not said:
                say(f"looking for other machines of this run, for {left:.0f} s: its service has just started")
            said = True
            time.sleep(min(left, POLL))
        return True

    def _watch(self) -> int:
        """Replace lost workers until the run has ended."""
        while True:
            status = self.service.ask("status", node=self.node, since=self.seen)
            if status is not None:
                for event in status["events"]:
                    if text := in_words(event, self.node):
                        say(text)
                self.seen += len(status["events"])
            if status is not None and self.node in status["failing"] and len(status["nodes"]) > 1:
                self._leave_as_failing()
            self._stop_if_asked(status)
            if status is not None and not self.stopping:
                self._wait_for_others(status)
            self.workers.keep_spares(status, stopping=self.stopping is not None)
            ended = (status or {}).get("ended")
            for slot in self.workers.slots:
                self.workers.update(slot, status, ended=ended is not None, stopping=self.stopping is not None)
            if not self.workers.running():
                if ended is not None:
                    return self._end(ended)
                if self.stopping:
                    return self._stopped(self.stopping)
                if status is not None and all(slot.left for slot in self.workers.slots):
                    return self._given_up(status)
            time.sleep(POLL)

    def _wait_for_others(self, status: dict[str, Any]) -> None:
        """Say that too few workers are there for the run to begin or to go on, and end it when that lasts."""
        message, over = self.short.look(status, time.monotonic())
        if message and not over:
            say(message)
        elif over:
            self.service.until_answered("end", code=1, message=message)

    def _leave_as_failing(self) -> None:
        """The workers of this machine fail, and those of no other: it takes part no more."""
        self.service.report("node fails", self.node, why="its workers fail and no others do")
        self.workers.leave()

    def _stopped(self, number: int) -> int:
        """All workers have ended after a signal. Without other machines their copies may be the newest state of the run, which
        the same command goes on from."""
        self.workers.end_spares()
        status = self.service.ask("status", since=self.seen)
        if status is not None and status["ended"] is not None:  # since the last question
            return self._end(status["ended"])
        if status is not None and set(status["nodes"]) - {self.node}:
            self._remove_copies()
        return 128 + number

    def _remove_copies(self) -> None:
        """Free the memory of this machine's copies, which others go on without."""
        remove_flash(flash_base(self.elastic.flash_folder, self.out), self.node)

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
            self.service.until_answered("node", name=self.node, numbers=[])
            return
        self.workers.signal(self.stopping)

    def _end(self, ended: dict[str, Any]) -> int:
        """The run has ended for all: free what it held."""
        self.workers.end_spares()
        remove_flash(flash_base(self.elastic.flash_folder, self.out))
        self.service.signal(signal.SIGTERM)
        if ended["code"] == 0:
            return 0
        failure = LubanError(ended["message"])
        failure.exit_code = ended["code"]
        raise failure
