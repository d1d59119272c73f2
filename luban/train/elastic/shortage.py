"""Too few workers for a run to begin or to go on: what is said of it, and when the run ends with it. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luban.core.units import counted


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
        missing = f"elastic.min_workers is {fewest}, and {ready} of the {counted(expected, 'worker')} of this run {'is' if ready == 1 else 'are'} ready"
        if now - self.since > self.patience:
            return (
                f"{missing} after {self.patience:.0f} s: start more, or give --elastic.min_workers {max(ready, 1)}",
                True,
            )
        if self.said or (expected >= fewest and now - self.since < self.unsaid):
            return "", False
        self.said = True
        return f"{missing}: waiting for more, for {self.patience:.0f} s (--elastic.wait_seconds)", False
