"""Line charts as SVG, drawn in Python so that a page needs nothing but itself."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 720, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 28, 40
EDGE = 3  # pixels beyond the frame in which a curve along its edge is still drawn
# Of a chart's curves one after the other, (width, dashes): where several lie on each other, the lower ones show beside the narrower upper
# ones and in their gaps.
STROKES = ((5.0, ""), (3.6, "18 12"), (2.4, "9 9"), (1.4, "3 4"))


@dataclass(frozen=True)
class Series:
    """One curve. `tone` is a colour class of the page: a, b, c or d."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: str = "a"
    faint: bool = False  # thin and pale: raw data behind a smoother curve
    dots: bool = False  # mark every point


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    value: float
    tone: str = "c"


@dataclass(frozen=True)
class Mark:
    """A vertical line at a moment that stands out; values there may leave the frame."""

    name: str
    x: float


@dataclass(frozen=True)
class Chart:
    """A chart's contents, in data units."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    levels: Sequence[Level] = field(default_factory=tuple)
    marks: Sequence[Mark] = field(default_factory=tuple)
    zero: bool = False  # the y axis starts at zero
    top: float | None = None  # a value that the y axis reaches at least, as charts side by side have one scale
    clip_start: float = 0.0  # share of the curve's start that may leave the frame (a steep first descent)
    width: int = WIDTH
    height: int = HEIGHT


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers covering [low, high], `about` of them: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick in few characters: 1500000 → 1.5M, 0.0003 → 3e-04."""
    if value == 0:
        return "0"
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}" if abs(value) >= 0.001 else f"{value:.0e}"


def smooth(points: Sequence[tuple[float, float]], over: float) -> list[tuple[float, float]]:
    """Exponential moving average whose weights fall by a factor of e over `over` units of x, however densely x is sampled;
    its start is corrected for bias, as Adam corrects its moments."""
    out, mean, total, before = [], 0.0, 0.0, None
    for x, y in points:
        kept = math.exp(-(1.0 if before is None else x - before) / over)
        mean, total = kept * mean + (1 - kept) * y, kept * total + (1 - kept)
        out.append((x, mean / total if total else y))
        before = x
    return out


def draw(chart: Chart) -> str:
    """The chart as an SVG element; hovering reads its values from `data-series`."""
    curves = [
        Series(s.name, [p for p in s.points if all(map(math.isfinite, p))], s.tone, s.faint, s.dots)
        for s in chart.series
    ]
    curves = [s for s in curves if s.points]
    if not curves:
        return ""
    x_low, x_high = (f(x for s in curves for x, _ in s.points) for f in (min, max))
    y_low, y_high = _range(chart, curves)
    bottom = chart.height - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x_low) / ((x_high - x_low) or 1) * (chart.width - LEFT - RIGHT),
            bottom - (y - y_low) / ((y_high - y_low) or 1) * (bottom - TOP),
        )

    parts = [
        *_axes(chart, place, (x_low, x_high), (y_low, y_high)),
        *_levels(chart, place, x_low, y_low, y_high),
        *_marks(chart, place, x_low, x_high),
    ]
    strokes, clip = _strokes(curves), f"frame-{chart.width}-{chart.height}"
    for curve, attributes in zip(curves, strokes, strict=True):
        spots = [place(x, y) for x, y in curve.points]
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        faint = " faint" if curve.faint else ""
        parts.append(f'<path class="curve {curve.tone}{faint}"{attributes} d="{path}" clip-path="url(#{clip})"/>')
        if curve.dots:
            parts += [f'<circle class="dot {curve.tone}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in spots]
    data = {
        "x": [x_low, x_high],
        "y": [y_low, y_high],
        "plot": [LEFT, chart.width - RIGHT, TOP, bottom],
        "xLabel": chart.x_label,
        "series": [
            {"name": s.name, "tone": s.tone, "points": [[round(x, 6), round(y, 6)] for x, y in s.points]}
            for s in curves
            if not s.faint
        ],
    }
    return (
        f'<svg class="chart" viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{escape(chart.title)}" '
        f"data-chart='{escape(json.dumps(data), quote=True)}'>"
        f'<defs><clipPath id="{clip}"><rect x="{LEFT - EDGE}" y="{TOP - EDGE}" width="{chart.width - LEFT - RIGHT + 2 * EDGE}" '
        f'height="{bottom - TOP + 2 * EDGE}"/></clipPath></defs>{"".join(parts)}<g class="hover"></g></svg>'
    )


def stroke(number: int) -> str:
    """SVG attributes of the `number`-th of several curves, so that each is seen where they lie on each other."""
    width, dashes = STROKES[number % len(STROKES)]
    return f' style="stroke-width:{width}{f";stroke-dasharray:{dashes}" if dashes else ""}"'


def _strokes(curves: Sequence[Series]) -> list[str]:
    clear = [i for i, curve in enumerate(curves) if not curve.faint]
    found = [""] * len(curves)
    for number, i in enumerate(clear if len(clear) > 1 else []):
        found[i] = stroke(number)
    return found


def _range(chart: Chart, curves: Sequence[Series]) -> tuple[float, float]:
    marked = {mark.x for mark in chart.marks}
    kept = [y for s in curves for x, y in s.points[int(len(s.points) * chart.clip_start) :] if x not in marked]
    kept = kept or [y for s in curves for _, y in s.points]
    values = [*kept, *(level.value for level in chart.levels), *([] if chart.top is None else [chart.top])]
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return (0.0 if chart.zero else low - margin), high + margin


def _axes(chart: Chart, place, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    bottom = chart.height - BOTTOM
    parts = []
    for value in ticks(*ys):
        _, y = place(xs[0], value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label(value)}</text>'
        )
    for value in ticks(*xs, about=chart.width // 110):
        x, _ = place(value, ys[0])
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{label(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="name" x="{(LEFT + chart.width - RIGHT) / 2}" y="{chart.height - 6}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>"
        f'<text class="name" x="4" y="14">{escape(chart.y_label)}</text>'
    )
    return parts


def _levels(chart: Chart, place, x_low: float, y_low: float, y_high: float) -> list[str]:
    parts = []
    for level in chart.levels:
        if y_low <= level.value <= y_high:
            _, y = place(x_low, level.value)
            parts.append(
                f'<line class="level {level.tone}" x1="{LEFT}" x2="{chart.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="level {level.tone}" x="{chart.width - RIGHT - 4}" y="{y - 6:.1f}" text-anchor="end">'
                f"{escape(level.name)} {level.value:.3g}</text>"
            )
    return parts


def _marks(chart: Chart, place, x_low: float, x_high: float) -> list[str]:
    parts, bottom = [], chart.height - BOTTOM
    for mark in chart.marks:
        if x_low <= mark.x <= x_high:
            x, _ = place(mark.x, 0.0)
            parts.append(
                f'<g class="mark"><title>{escape(mark.name)}</title><line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>'
                f'<path d="M{x - 5:.1f},{TOP - 8}h10l-5,8z"/></g>'
            )
    return parts
