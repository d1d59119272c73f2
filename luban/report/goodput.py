"""Where the seconds of a training run went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from luban.core.units import seconds
from luban.train.goodput import KINDS


def goodput_rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each kind of a run's seconds: name, what it is, seconds as text, share in percent; none where the run has none.

    Args:
        figures: of the run's manifest.
    """
    spent = figures.get("goodput", {})
    total = sum(spent.get(kind, 0.0) for kind in KINDS)
    if not total:
        return []
    return [
        {
            "name": kind,
            "about": about,
            "text": seconds(spent.get(kind, 0.0)),
            "share": round(100 * spent.get(kind, 0.0) / total, 1),
        }
        for kind, about in KINDS.items()
    ]


def failures_line(figures: Mapping[str, Any]) -> str:
    """What an elastic run went through; empty for others."""
    found = figures.get("elastic")
    if not found:
        return ""
    rows = found["rows"]
    once = f"{rows['rows']:,} rows of {rows['steps']:,} steps were each used once"
    if rows["wrong"]:
        once = f"rows of {len(rows['wrong'])} steps were not used exactly once"
    slow = f" Slow workers: {', '.join(found['stragglers'])}." if found["stragglers"] else ""
    return f"Seconds of all workers. Generations: {found['generations']}; workers lost: {found['lost_workers']}; {once}.{slow}"
