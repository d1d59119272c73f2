"""Pictures of evaluations over long texts: a heat map of facts found by length and depth, loss by position, time by length."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from luban.core.units import bytes_, count
from luban.report.chart import Chart, Series, draw
from luban.report.gather import SMALL_HEIGHT, SMALL_WIDTH, Found, read_items

CELL_WIDTH, CELL_HEIGHT, LEFT, TOP = 58, 34, 64, 8


def long_context_sections(evaluations: Sequence[Found]) -> list[dict[str, Any]]:
    """A section of the page for each evaluation with rows of `needle` or `context_length`."""
    found = []
    for each in evaluations:
        needles = read_items(each.path / "needle.jsonl")
        pictures = [{"title": "Facts found by length and depth", "svg": heat_map(needles), "legend": []}] * bool(
            needles
        )
        pictures += position_pictures(read_items(each.path / "context_length.jsonl"))
        if pictures:
            about = "Held-out documents one after another. A fact counts as found where the model repeats all of it when asked at the end."
            found.append(
                {
                    "title": f"Long texts: {each.name}",
                    "about": about,
                    "main": None,
                    "small": pictures,
                    "reward_model": [],
                    "rollouts": None,
                    "predicted_vs_measured": [],
                    "goodput": [],
                }
            )
    return found


def heat_map(rows: Sequence[dict[str, Any]]) -> str:
    """Share of facts found, lengths from left to right, depths from top to bottom, as SVG."""
    lengths, depths = (sorted({row[name] for row in rows}) for name in ("length", "depth"))
    width, height = LEFT + CELL_WIDTH * len(lengths) + 8, TOP + CELL_HEIGHT * len(depths) + 40
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="facts found by length and depth">']
    for i, length in enumerate(lengths):
        x = LEFT + CELL_WIDTH * i
        for j, depth in enumerate(depths):
            cell = [row["found"] for row in rows if (row["length"], row["depth"]) == (length, depth)]
            if not cell:
                continue
            share, y = sum(cell) / len(cell), TOP + CELL_HEIGHT * j
            fill = f"hsl({120 * share:.0f} 55% {78 - 26 * share:.0f}%)"
            parts.append(
                f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 2}" height="{CELL_HEIGHT - 2}" fill="{fill}">'
                f"<title>{length} tokens, depth {depth:.0%}: {sum(cell)} of {len(cell)}</title></rect>"
                f'<text x="{x + CELL_WIDTH / 2 - 1}" y="{y + 21}" text-anchor="middle" fill="#111" font-size="12">{share:.0%}</text>'
            )
        label = escape(count(float(length)) if length >= 10_000 else f"{length:,}")
        parts.append(_label(x + CELL_WIDTH / 2, TOP + CELL_HEIGHT * len(depths) + 16, label, "middle"))
    for j, depth in enumerate(depths):
        parts.append(_label(LEFT - 6, TOP + CELL_HEIGHT * j + 21, f"{depth:.0%}", "end"))
    parts.append(_label(LEFT, height - 6, "tokens; rows: depth of the fact", "start"))
    return "".join([*parts, "</svg>"])


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="12" fill="currentColor">{text}</text>'


def position_pictures(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Loss by position, and seconds (and bytes, where they were measured) by length."""
    losses = [(float(row["end"]), float(row["loss"])) for row in rows if "loss" in row]
    seconds = [(float(row["length"]), float(row["seconds"])) for row in rows if "seconds" in row]
    taken = [(float(row["length"]), float(row["bytes"])) for row in rows if row.get("bytes") is not None]
    charts = []
    if losses:
        series = [Series("loss", losses, "a", dots=True)]
        charts.append(
            Chart(
                "Loss by position: ranges that end there",
                "tokens before",
                "nats a token",
                series,
                width=SMALL_WIDTH,
                height=SMALL_HEIGHT,
            )
        )
    if seconds:
        series = [Series("seconds", seconds, "c", dots=True)]
        charts.append(
            Chart(
                "Seconds of a forward", "tokens", "seconds", series, zero=True, width=SMALL_WIDTH, height=SMALL_HEIGHT
            )
        )
    if taken:
        most = bytes_(max(value for _, value in taken))
        series = [Series("bytes", taken, "d", dots=True)]
        charts.append(
            Chart(
                f"Memory beside the weights: {most} at most",
                "tokens",
                "bytes",
                series,
                zero=True,
                width=SMALL_WIDTH,
                height=SMALL_HEIGHT,
            )
        )
    return [{"title": chart.title, "svg": draw(chart), "legend": []} for chart in charts]
