"""A clock that stands still until a test moves it."""

from __future__ import annotations


class Clock:
    """Called, it gives its seconds, as `time.monotonic` does."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.seconds += seconds
