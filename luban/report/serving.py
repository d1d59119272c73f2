"""The page of a serving benchmark: latency against load, and the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from luban.report.chart import Chart, Series, draw
from luban.serve.bench.measure import Row, table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: #fff; color: #222 }
svg { width: 100%; height: auto } pre { overflow-x: auto } figcaption { font-weight: 600 }
.curve { fill: none; stroke-width: 2 } .grid { stroke: #ddd } text { fill: #555; font-size: 11px }
.curve.a { stroke: #1f6feb } .curve.b { stroke: #c2410c } .curve.c { stroke: #15803d }
.dot.a { fill: #1f6feb } .dot.b { fill: #c2410c } .dot.c { fill: #15803d }
.key span { margin-right: 1.5rem } .key .a { color: #1f6feb } .key .b { color: #c2410c } .key .c { color: #15803d }
@media (prefers-color-scheme: dark) { body { background: #111; color: #ddd } text { fill: #aaa } .grid { stroke: #333 } }
"""
TONES = {50: "a", 95: "b", 99: "c"}


def serving_page(title: str, rows: Sequence[Row], circumstances: str) -> str:
    """A page that needs nothing but itself.

    Args:
        title: what was measured.
        circumstances: hardware, versions and the command.
    """
    known = sorted((row for row in rows if row.requests), key=lambda row: row.served_rate)
    charts = []
    for name, part in (("First token", "first_token"), ("Between tokens", "between_tokens")):
        series = [
            Series(f"p{share}", [(row.served_rate, getattr(row, part)[share]) for row in known], tone, dots=True)
            for share, tone in TONES.items()
        ]
        finite = [s for s in series if any(math.isfinite(y) for _, y in s.points)]
        chart = Chart(name, "requests served a second", "milliseconds", finite, zero=True)
        charts.append(f"<figure><figcaption>{name}, ms</figcaption>{draw(chart)}</figure>")
    key = "".join(f'<span class="{tone}">● p{share}</span>' for share, tone in TONES.items())
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
        f"<h1>{escape(title)}</h1><p>{escape(circumstances)}</p><p class=key>{key}</p>{''.join(charts)}"
        f"<pre>{escape(table(rows))}</pre></html>"
    )
