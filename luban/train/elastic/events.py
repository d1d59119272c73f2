"""What happens in an elastic run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luban.core.units import counted


def in_words(event: Mapping[str, Any], node: str = "") -> str | None:
    """A line for the person at the terminal of a node; None: nothing to tell, or its worker has told it there."""
    who, detail = event["who"], event["detail"]
    match event["kind"]:
        case "lost":
            return f"worker {who} is lost ({detail['how']}); the others keep running"
        case "straggler":
            return f"worker {who} is slow: its steps take {detail['times_slower']} times those of the others"
        case "node joins":
            return f"{who} joins with {counted(detail['workers'], 'worker')}"
        case "node leaves":
            return f"{who} leaves"
        case "node fails":
            return f"{who} fails: {detail['why']}"
        case "refused" if who.rpartition("/")[0] != node:
            return f"worker {who} is refused, since it has {detail['differences']}"
        case "generation begins":
            return f"generation {detail['generation']}: {counted(detail['workers'], 'worker')}"
        case _:
            return None
