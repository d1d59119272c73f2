"""The picture of a roofline: operations by FLOPs a byte, under the line that memory and matmuls draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from luban.planner.roofline import Fusion, Point, Roof, fusion_table, table

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 460, 70, 20, 20, 50
TONES = {
    "linear": "#1f6feb",
    "lm_head": "#0e7490",
    "attention": "#c2410c",
    "mixing": "#b45309",
    "norm": "#15803d",
    "activation": "#7c3aed",
}
OTHER = "#6b7280"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222 }
svg { width: 100%; height: auto } pre { overflow-x: auto } text { fill: #555; font-size: 11px }
.grid { stroke: #ddd } .roof { fill: none; stroke: #222; stroke-width: 2 } .key span { margin-right: 1.5rem }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } text { fill: #aaa } .grid { stroke: #333 } .roof { stroke: #ddd } }
"""


def picture(points: Sequence[Point], roof: Roof) -> str:
    """SVG, both axes logarithmic. A filled dot is what was measured, an open one the most that the roof allows; operations
    without FLOPs of matmuls are left out, since they would lie at minus infinity."""
    shown = [point for point in points if point.flops]
    intensities = [point.intensity for point in shown] or [1.0]
    low, high = min(*intensities, roof.ridge / 4), max(*intensities, roof.ridge * 4)
    reached = [point.flops / point.measured for point in shown if point.measured]
    attainable = [min(roof.flops, point.intensity * roof.bandwidth) for point in shown]
    bottom = min([*reached, *attainable, roof.flops]) / 2
    top = 1.5 * max([roof.flops, *reached])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(low)) / (math.log(high) - math.log(low))
        up = (math.log(y) - math.log(bottom)) / (math.log(top) - math.log(bottom))
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [*_grid(place, (low, high), (bottom, top))]
    corners = [
        (max(low, bottom / roof.bandwidth), max(low * roof.bandwidth, bottom)),
        (roof.ridge, roof.flops),
        (high, roof.flops),
    ]
    parts.append(
        '<path class="roof" d="M' + "L".join("{:.1f},{:.1f}".format(*place(*corner)) for corner in corners) + '"/>'
    )
    for point, most in zip(shown, attainable, strict=True):
        tone = TONES.get(point.kind, OTHER)
        title = f"<title>{escape(point.name)} × {point.count}: {point.intensity:.1f} FLOP/B</title>"
        x, y = place(point.intensity, most)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="none" stroke="{tone}">{title}</circle>')
        if point.measured:
            x, y = place(point.intensity, point.flops / point.measured)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{tone}">{title}</circle>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline">{"".join(parts)}</svg>'


def _grid(place, xs: tuple[float, float], ys: tuple[float, float]) -> list[str]:
    parts = []
    for power in range(math.ceil(math.log10(xs[0])), math.floor(math.log10(xs[1])) + 1):
        x, _ = place(10.0**power, ys[0])
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{10.0**power:g}</text>')
    for power in range(math.ceil(math.log10(ys[0])), math.floor(math.log10(ys[1])) + 1):
        _, y = place(xs[0], 10.0**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0 ** (power - 9):g}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">FLOPs a byte</text>')
    parts.append(f'<text x="8" y="{TOP}" text-anchor="start">GFLOP/s</text>')
    return parts


def roofline_page(
    title: str, points: Sequence[Point], fusions: Sequence[Fusion], traffic: str, roof: Roof, about: str
) -> str:
    """A page that needs nothing but itself.

    Args:
        traffic: attention's traffic beside FlashAttention's formulas, as text.
        about: hardware, versions and the command.
    """
    kinds = dict.fromkeys(point.kind for point in points if point.flops)
    key = "".join(f'<span style="color:{TONES.get(kind, OTHER)}">● {kind}</span>' for kind in kinds)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1><p>{escape(about)}</p><p class=key>{key}<span>filled: measured</span>"
        f"<span>open: what the roof allows</span></p>{picture(points, roof)}"
        f"<pre>{escape(table(points, roof))}</pre><h2>What fusing buys</h2><pre>{escape(fusion_table(fusions, roof))}</pre>"
        f"<h2>Attention's traffic</h2><pre>{escape(traffic)}</pre></html>"
    )
