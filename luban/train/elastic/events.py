"""What happens in an elastic run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def in_words(event: Mapping[str, Any]) -> str | None:
    """A line for the person at the terminal; None: nothing to tell."""
    who, detail = event["who"], event["detail"]
    match event["kind"]:
        case "lost":
            return f"worker {who} is lost ({detail['how']}); the others keep running"
        case "straggler":
            return f"worker {who} is slow: its steps take {detail['times_slower']} times those of the others"
        case "node joins":
            return f"{who} joins with {detail['workers']} workers"
        case "node leaves":
            return f"{who} leaves"
        case "node fails":
            return f"{who} fails: {detail['why']}"
        case "refused":
            return f"worker {who} is refused: {detail['differences']}"
        case "generation begins":
            return f"generation {detail['generation']}: {detail['workers']} workers"
        case _:
            return None
