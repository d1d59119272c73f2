"""Training compute over the years as a picture: one point a system, one line an era."""

from __future__ import annotations

from collections.abc import Sequence
from math import log10

from luban.planner.accounting.history import TrainedSystem, Trend
from luban.report.chart import Chart, Series, draw

# the colours of a page's charts, for a file that stands alone
STYLE = (
    "text{font:12px sans-serif;fill:#555}.grid{stroke:#e4e4e4}.axis{stroke:#888}.curve{fill:none;stroke-width:2}"
    ".a{stroke:#3b6fd4}.b{stroke:#d4783b}.c{stroke:#3ba05b}.d{stroke:#8d4fc0}.curve.faint{stroke:none}"
    "circle.dot{fill:#777;stroke:none}"
)
TONES = "abcd"


def draw_history(systems: Sequence[TrainedSystem], trends: Sequence[Trend]) -> str:
    """An SVG file's text."""
    series = [Series("systems", [(s.year, log10(s.flops)) for s in systems], faint=True, dots=True)]
    series += [
        Series(
            f"{int(trend.start)} to {int(trend.end)}: doubles every {trend.doubling_months:.1f} months",
            [(trend.start, trend.log10_at_start), (trend.end, trend.log10_at_end)],
            TONES[index % len(TONES)],
        )
        for index, trend in enumerate(trends)
    ]
    chart = Chart("Training compute, powers of ten of FLOPs", "year", "log10 FLOPs", series, width=900, height=480)
    legend = "".join(
        f'<line class="curve {curve.tone}" x1="70" x2="94" y1="{28 + 18 * row}" y2="{28 + 18 * row}"/>'
        f'<text x="100" y="{32 + 18 * row}">{curve.name}</text>'
        for row, curve in enumerate(series[1:])
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{chart.width}" height="{chart.height}" class="chart"'
    body = draw(chart).replace('<svg class="chart"', head, 1)
    title = f'<text x="60" y="12">{chart.title}</text>'
    return body.replace("<defs>", f"<style>{STYLE}</style><defs>", 1).replace("</svg>", f"{title}{legend}</svg>") + "\n"
