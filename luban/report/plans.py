"""Where the time of each plan goes, as horizontal bars in SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from luban.core.units import milliseconds
from luban.planner.search.estimate import Estimate
from luban.planner.search.plans import described

WIDTH, ROW, BAR, LEFT, TOP = 960, 44, 16, 12, 40
PARTS = (("computing", "#4477aa"), ("communication", "#ee8866"), ("bubble", "#bbbbbb"), ("update and rest", "#44aa77"))


def draw_plans(plans: Sequence[Estimate]) -> str:
    """One bar a plan, as long as its step."""
    longest = max(plan.seconds for plan in plans)
    scale = (WIDTH - 2 * LEFT - 90) / longest
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {TOP + ROW * len(plans)}" '
        'font-family="sans-serif" font-size="12" role="img" aria-label="Step time of plans by what it is spent on">'
    ]
    x = LEFT
    for name, colour in PARTS:
        lines.append(
            f'<rect x="{x}" y="10" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="20">{name}</text>'
        )
        x += 30 + 8 * len(name)
    for number, plan in enumerate(plans):
        y = TOP + number * ROW
        lines.append(f'<text x="{LEFT}" y="{y + 10}">{number + 1}. {escape(described(plan.candidate))}</text>')
        at = float(LEFT)
        for seconds, (_, colour) in zip(_parts(plan), PARTS, strict=True):
            lines.append(
                f'<rect x="{at:.1f}" y="{y + 15}" width="{scale * seconds:.1f}" height="{BAR}" fill="{colour}"/>'
            )
            at += scale * seconds
        lines.append(f'<text x="{at + 6:.1f}" y="{y + 15 + BAR - 4}">{milliseconds(plan.seconds)}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _parts(plan: Estimate) -> tuple[float, float, float, float]:
    sends, waits = plan.messages * plan.seconds, plan.bubble * plan.seconds
    return plan.computing, sends, waits, max(plan.seconds - plan.computing - sends - waits, 0.0)
