"""The distribution of job completion times under two policies, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from luban.core.page import page_style
from luban.planner.jobs.results import PolicyFigures
from luban.report.chart import Chart, Series, draw

CURVES = ".curve { fill: none; stroke-width: 2; } .curve.a { stroke: var(--a); } .curve.b { stroke: var(--b); }"


def completion_page(found: Sequence[PolicyFigures], about: str) -> str:
    """One page: the share of jobs that are done after so many hours, and the figures."""
    series = [Series(each.policy, distribution(each.hours), tone) for each, tone in zip(found, "ab", strict=False)]
    picture = draw(Chart("job completion times", "hours", "share of jobs", series, zero=True))
    rows = "".join(
        f"<tr><td>{escape(each.policy)}</td><td>{each.mean_hours:.2f}</td><td>{each.median_hours:.2f}</td>"
        f"<td>{each.p90_hours:.2f}</td><td>{each.useful:.0%}</td><td>{each.out_of_memory}</td></tr>"
        for each in found
    )
    names = "hours: mean", "median", "p90", "useful workers", "out of memory"
    head = "<tr><th></th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Job completion times</title><style>{page_style()}'
        f"{CURVES}</style><body><main><h1>Job completion times</h1><p>{escape(about)}</p>{picture}"
        f"<p>{escape(found[0].policy)}: first colour; {escape(found[-1].policy)}: second.</p><table>{head}{rows}</table>"
        "</main></body></html>"
    )


def distribution(hours: Sequence[float]) -> list[tuple[float, float]]:
    """(hours, share of jobs done by then)."""
    return [(value, (number + 1) / len(hours)) for number, value in enumerate(sorted(hours))]
