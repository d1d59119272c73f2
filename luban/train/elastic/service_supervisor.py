"""An agent's side of the service: requests, and the service started again where it doesn't answer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from luban.core.artifact import read_table
from luban.core.errors import LubanError, TrainingError
from luban.train.elastic.processes import Process
from luban.train.elastic.service import ADDRESS, SERVICE
from luban.train.elastic.wire import Client

POLL = 0.05  # seconds
START_SECONDS = 60.0  # in which a service must start
Start = Callable[[Sequence[str], Mapping[str, str]], subprocess.Popen]


def start_process(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    """Start Python with these words, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *words], env=dict(environment), start_new_session=True, stdin=subprocess.PIPE
    )


class ServiceSupervisor:
    """Asks the service of a run, and starts it where there is none.

    Args:
        folder: that the processes of the run share.
        start: starts a process of this Python.
        silent_seconds: after which a service that runs and doesn't answer is killed.
    """

    def __init__(self, folder: Path, start: Start, silent_seconds: float):
        self.folder, self.start, self.silent_seconds = folder, start, silent_seconds
        self.client = Client(folder / ADDRESS, patience=0.0)
        self.process: Process | None = None  # where this agent has started it
        self.unanswered: float | None = None  # since when it hasn't answered

    def ask(self, operation: str, **fields: Any) -> Any:
        """The service's answer; None: it doesn't answer, and is being started."""
        try:
            found = self.client(operation, **fields)
            self.unanswered = None
            return found
        except TrainingError:
            self._restart()
            return None

    def until_answered(self, operation: str, **fields: Any) -> Any:
        """As `ask`, but waits for a service that is being started. Raises TrainingError where it doesn't."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                return self.client(operation, **fields)
            except TrainingError:
                self._restart()
            time.sleep(POLL)
        raise TrainingError(f"the service of this run does not start: see {self.folder}")

    def told(self, operation: str, **fields: Any) -> bool:
        """Whether the service has taken a message."""
        try:
            self.client(operation, **fields)
        except TrainingError:
            return False
        return True

    def report(self, kind: str, who: str, **detail: Any) -> None:
        """Have an event recorded, once however often the request is sent."""
        self.until_answered("event", request=uuid.uuid4().hex, kind=kind, who=who, **detail)

    def signal(self, number: int) -> None:
        """Send a signal to the service, whoever has started it."""
        with suppress(OSError, LubanError):
            found = read_table(self.folder / SERVICE)
            Process(found["pid"], found["started"]).signal(number)

    def _restart(self) -> None:
        now = time.monotonic()
        self.unanswered = self.unanswered or now
        if self.process is None or not self.process.alive():  # a second one ends at once
            words = ["-m", "luban.train.elastic.service", str(self.folder)]
            self.process = Process.of(self.start(words, os.environ))
        if now - self.unanswered > self.silent_seconds:  # it runs, and hangs
            self.signal(signal.SIGKILL)
            self.unanswered = now
