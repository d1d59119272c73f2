"""Training compute over the years as a picture: one point a system, one line an era, FLOPs on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log10

from luban.planner.accounting.history import TrainedSystem, Trend
from luban.report.chart import ticks

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 960, 540, 60, 110, 40, 40
COLOURS = ("#3b6fd4", "#d4783b", "#3ba05b", "#8d4fc0")
LABEL_WIDTH, LABEL_HEIGHT = 125, 13  # of a name beside its point, at most


def draw_history(systems: Sequence[TrainedSystem], trends: Sequence[Trend]) -> str:
    """The text of an SVG file that needs nothing else."""
    years, powers = [s.year for s in systems], [log10(s.flops) for s in systems]
    low_x, high_x, low_y, high_y = min(years), max(years), min(powers) - 1, max(powers) + 1

    def place(year: float, power: float) -> tuple[float, float]:
        x = LEFT + (year - low_x) / ((high_x - low_x) or 1) * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - (power - low_y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 20, "Training compute in FLOPs", 15),
    ]
    for power in ticks(low_y, high_y, 10):
        y = place(low_x, power)[1]
        parts.append(_line((LEFT, y), (WIDTH - RIGHT, y), "#e4e4e4", 1))
        parts.append(_text(LEFT - 8, y + 4, f"1e{power:g}", anchor="end"))
    for year in ticks(low_x, high_x, 8):
        parts.append(_text(place(year, 0)[0], HEIGHT - BOTTOM + 18, f"{year:.0f}", anchor="middle"))
    for row, trend in enumerate(trends):
        colour = COLOURS[row % len(COLOURS)]
        ends = place(trend.start, trend.log10_at_start), place(trend.end, trend.log10_at_end)
        y = TOP + 14 + 18 * row
        about = f"{int(trend.start)} to {int(trend.end)}: doubles every {trend.doubling_months:.1f} months"
        parts += [_line(*ends, colour, 2), _line((LEFT + 10, y - 4), (LEFT + 34, y - 4), colour, 2)]
        parts.append(_text(LEFT + 42, y, about))
    parts += _points(systems, [place(*at) for at in zip(years, powers, strict=True)])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
    return "\n".join([head, *parts, "</svg>", ""])


def _points(systems: Sequence[TrainedSystem], places: Sequence[tuple[float, float]]) -> list[str]:
    """A dot a system, its name where hovered over, and beside it where no other dot or earlier name is in the way."""
    parts: list[str] = []
    named: list[tuple[float, float]] = []
    for system, (x, y) in zip(systems, places, strict=True):
        about = escape(f"{system.name}, {system.date}, {system.flops:.1e} FLOPs")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#555"><title>{about}</title></circle>')
        free = not any(0 < x1 - x < LABEL_WIDTH / 2 and abs(y1 - y) < LABEL_HEIGHT / 2 for x1, y1 in places)
        if free and all(abs(x - x0) > LABEL_WIDTH or abs(y - y0) > LABEL_HEIGHT for x0, y0 in named):
            named.append((x, y))
            parts.append(_text(x + 6, y + 4, system.name, 10))
    return parts


def _text(x: float, y: float, text: str, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="sans-serif" font-size="{size}" fill="#444" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(start: tuple[float, float], end: tuple[float, float], colour: str, width: int) -> str:
    points = f'x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
    return f'<line {points} stroke="{colour}" stroke-width="{width}"/>'
