"""A person at the keyboard as TAMER's trainer: the grid is drawn, keys say what they think of the last step."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from luban.align.tamer.gridworld import Gridworld
from luban.align.tamer.learning import Feedback, Step
from luban.core.errors import UsageError

GOOD, BAD, QUIT = "+=g", "-_b", "q\x03\x04"
KEYS = "+ or g: good   - or b: bad   q: end"
CLEAR = "\x1b[H\x1b[2J"  # cursor to the corner, everything wiped


class Keyboard:
    """See `Trainer`. Each step is shown for as long as it lasts.

    Args:
        descriptor: of what keys are read from, a byte a key.
        screen: what is drawn on.
    """

    def __init__(self, world: Gridworld, descriptor: int, screen: TextIO):
        self.world, self.descriptor, self.screen = world, descriptor, screen
        self.said = "…"

    def watch(self, step: Step | None, start: float, end: float) -> list[Feedback]:
        """See `Trainer`. Raises KeyboardInterrupt where the person ends it."""
        if step is not None:
            self._draw(step)
        found, began = [], time.monotonic()
        while (left := end - start - (time.monotonic() - began)) > 0:
            if not select.select([self.descriptor], [], [], left)[0]:
                break
            key = os.read(self.descriptor, 1).decode("latin-1").lower()
            if not key or key in QUIT:
                raise KeyboardInterrupt
            if key in GOOD or key in BAD:
                passed = min(time.monotonic() - began, end - start)
                found.append(Feedback(start + passed, 1.0 if key in GOOD else -1.0))
                self.said = "good" if key in GOOD else "bad"
                if step is not None:
                    self._draw(step)
        return found

    def _draw(self, step: Step) -> None:
        self.screen.write(f"{CLEAR}{self.world.drawn(step.reached, step.action)}\n\n{KEYS}\nlast said: {self.said}\n")
        self.screen.flush()


@contextmanager
def keys_of_terminal() -> Iterator[int]:
    """The descriptor of a terminal whose keys come one by one and aren't shown. Raises UsageError where there is none."""
    try:
        import termios
        import tty
    except ModuleNotFoundError:
        raise UsageError("keys are read from a POSIX terminal: give --oracle for a trainer that needs none") from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "a person needs a terminal to see the grid and press keys: give --oracle for a trainer that needs none"
        )
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        yield descriptor
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
