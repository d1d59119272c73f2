"""Processes of this machine by their id and start, which tells one from a later one of the same id."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path


def started_at(pid: int) -> str | None:
    """When a process began, as the system tells it; None: there is no such process, or only its exit status is left of it."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *rest = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else rest[18]
    command = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]
    state, _, began = subprocess.run(command, capture_output=True, text=True).stdout.strip().partition(" ")
    return None if not state or state.startswith("Z") else began.strip()


@dataclass
class Process:
    """A process, a child of this one or of an agent before it."""

    pid: int
    started: str
    child: subprocess.Popen | None = None  # where this process started it

    @classmethod
    def of(cls, child: subprocess.Popen) -> Process:
        """A child that was just started."""
        return cls(child.pid, started_at(child.pid) or "", child)

    def alive(self) -> bool:
        """Whether it still runs."""
        if self.child is not None:
            return self.child.poll() is None
        return started_at(self.pid) == self.started

    def signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ended_how(self) -> str:
        """In words; of a child that has ended its exit code or signal."""
        code = None if self.child is None else self.child.poll()
        if code is None:
            return "ended"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
