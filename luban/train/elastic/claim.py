"""Which process is which worker: one at a time, known to agents that come later."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from luban.core.artifact import write_json
from luban.train.elastic.processes import Process, started_at

VARIABLE = "LUBAN_ELASTIC"  # tells a worker who it is
TAKEN = 75  # exit code of a process whose name another process has
REFUSED = 76  # and of one that the run does not take


@dataclass(frozen=True)
class Worker:
    """A worker's name and process."""

    name: str  # NODE/NUMBER
    folder: Path  # that the processes of the run share
    incarnation: str  # of this process

    @property
    def node(self) -> str:
        """The machine that it is on."""
        return self.name.rpartition("/")[0]

    @property
    def number(self) -> int:
        """Which one of its machine, from 0."""
        return int(self.name.rpartition("/")[2])


def environment_of(name: str | None, folder: Path) -> dict[str, str]:
    """What tells a process that it is a worker, or a spare one, which is told its name later."""
    return {VARIABLE: json.dumps({"name": name, "folder": str(folder.resolve())})}


def is_worker() -> bool:
    """Whether this process was started as one, so that it can't know from its command how many there are."""
    return bool(os.environ.get(VARIABLE))


def told(prepare: Callable[[], object]) -> tuple[str, Path] | None:
    """Name and folder of the worker that this process was started as; None: it is none.

    A spare one does what takes long (`prepare`) and waits for its name, a line on its standard input; it ends when the agent
    that started it has.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    found = json.loads(text)
    if found["name"] is None:
        prepare()
        found["name"] = sys.stdin.readline().strip()
        if not found["name"]:
            raise SystemExit(0)
        os.environ[VARIABLE] = json.dumps(found)
    return found["name"], Path(found["folder"])


_claims: dict[str, tuple[Worker, TextIO]] = {}  # the lock is held until the process ends


def claim(name: str, folder: Path) -> Worker | None:
    """Become a worker; None: another process is it."""
    if name in _claims:
        return _claims[name][0]
    path = _file(name, folder)
    lock = open(path.with_suffix(".lock"), "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        return None
    worker = Worker(name, folder, uuid.uuid4().hex[:12])
    write_json(path, {"pid": os.getpid(), "started": started_at(os.getpid()), "incarnation": worker.incarnation})
    _claims[name] = worker, lock
    return worker


def claimed(name: str, folder: Path) -> tuple[Process, str] | None:
    """The running process of a worker and its incarnation; None: there is none."""
    try:
        found: Mapping = json.loads(_file(name, folder).read_text())
    except (OSError, ValueError):
        return None
    process = Process(found["pid"], found["started"])
    return (process, found["incarnation"]) if process.alive() else None


def incarnation_of(name: str, folder: Path, pid: int) -> str | None:
    """The incarnation of a worker's process, also of one that has ended; None: it had not begun."""
    try:
        found: Mapping = json.loads(_file(name, folder).read_text())
    except (OSError, ValueError):
        return None
    return found["incarnation"] if found["pid"] == pid else None


def stacks_of(name: str, folder: Path) -> Path:
    """Where a worker that hangs writes down what each of its threads does."""
    return folder / f"stacks-{name.replace('/', '-')}.txt"


def _file(name: str, folder: Path) -> Path:
    return folder / f"worker-{name.replace('/', '-')}.json"
