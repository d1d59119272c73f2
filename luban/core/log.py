"""Progress bars and messages on the terminal, and metrics files."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from luban.core.hashing import finite
from luban.core.units import count, seconds

SHOW_AFTER = 2.0  # seconds before a progress bar appears
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
RECENT = 30.0  # seconds after which what was done counts 1/e in the rate that tells the time left
_warned: set[str] = set()
_muted = False


def mute(muted: bool = True) -> None:
    """Say nothing from now on, or speak again: of a run's processes one speaks for all."""
    global _muted
    _muted = muted


def say(text: str, end: str = "\n") -> None:
    """A line for the person at the terminal, on standard error so that output can be piped.

    A reader that has gone away (`2>&1 | head -1`, a closed terminal) ends no work: what is said from then on is dropped.
    """
    if _muted:
        return
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        discard(sys.stderr)


def print_result(text: object) -> None:
    """Print what finished work is known by, on standard output. A reader that has gone away makes no failure of it."""
    if _muted:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard(sys.stdout)


def discard(stream: TextIO) -> None:
    """Send what is still written to `stream`, and what its buffer holds, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def warn(text: str) -> None:
    """A warning, shown once however often it is raised."""
    if text not in _warned:
        _warned.add(text)
        say(f"warning: {text}")


class Bar:
    """A progress bar with rate and time left; plain lines where there is no terminal.

    The time left is told by the rate of the last half minute or so, which forgets a first step that was compiled; the rate of
    what has ended is the average of it all.
    """

    def __init__(
        self, title: str, total: float | None, unit: str, start: float = 0, clock: Callable[[], float] = time.monotonic
    ):
        self.clock = clock  # seconds since any fixed moment
        self.title, self.total, self.unit = title, total, unit
        self.done, self.first, self.note = start, start, ""
        self.began = self.shown = self.counted = clock()
        self.lately, self.lately_seconds = 0.0, 0.0  # done in which time, both fading with age
        self.live = sys.stderr.isatty()
        self.visible = False
        self.said: tuple[float, str] | None = None  # what was done, and the note, when the last line was drawn

    def advance(self, amount: float = 1, note: str | None = None) -> None:
        """Count `amount` more as done; `note` replaces the words at the end of the line."""
        self.done += amount
        self.note = self.note if note is None else note
        now = self.clock()
        fading = math.exp((self.counted - now) / RECENT)
        self.lately = self.lately * fading + max(amount, 0)  # what is taken back was work, too
        self.lately_seconds = self.lately_seconds * fading + now - self.counted
        self.counted = now
        if now - self.began >= SHOW_AFTER and now - self.shown >= (0.2 if self.live else PLAIN_EVERY):
            self.shown, self.visible = now, True
            self._draw(now)

    def line(self, now: float) -> str:
        """The bar as text."""
        elapsed = max(now - self.began, 1e-9)
        rate = (self.done - self.first) / elapsed
        if not self.total:
            return self._words(count(self.done), rate, seconds(elapsed))
        share = min(self.done / self.total, 1.0)
        filled = int(24 * share)
        bar = f"{'█' * filled}{'░' * (24 - filled)} {share:4.0%} {count(self.done)}/{count(self.total)}"
        if self.done >= self.total:
            return self._words(bar, rate, f"in {seconds(elapsed)}")
        rate = self.lately / max(self.lately_seconds, 1e-9)
        return self._words(bar, rate, f"{seconds((self.total - self.done) / rate)} left" if rate > 0 else "")

    def _words(self, done: str, rate: float, took: str) -> str:
        return "  ".join([self.title, done, f"{count(float(rate))} {self.unit}/s", took, self.note]).rstrip()

    def _draw(self, now: float) -> None:
        self.said = self.done, self.note
        say(("\r\x1b[K" if self.live else "") + self.line(now), end="" if self.live else "\n")

    def close(self) -> None:
        """Draw the last state and end the line."""
        if self.visible and (self.live or self.said != (self.done, self.note)):  # a plain line isn't said twice
            self._draw(self.clock())
            if self.live:
                say("")


@contextmanager
def progress(
    title: str,
    total: float | None = None,
    unit: str = "it",
    start: float = 0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """`with progress("packing", total=n, unit="docs") as bar: bar.advance()`. Shown only past two seconds."""
    bar = Bar(title, total, unit, start, clock)
    try:
        yield bar
    finally:
        bar.close()


class Metrics:
    """`metrics.jsonl`: one object a logged step. Reopening at a step drops what a lost run wrote past it."""

    def __init__(self, path: Path, keep_until: int | None = None):
        self.path = path
        if keep_until is not None and path.exists():
            kept = [row for row in read_metrics(path) if row.get("step", 0) <= keep_until]
            path.write_text("".join(map(_metrics_line, kept)), encoding="utf-8")
        self.file: TextIO = open(path, "a" if keep_until is not None else "w", encoding="utf-8", buffering=1)

    def write(self, **row: Any) -> None:
        """Append one row; NaN and infinities are written as null."""
        self.file.write(_metrics_line(row))

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _metrics_line(row: dict[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line torn by a crash is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
