"""A leaderboard as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luban.core.metrics.ratings import START, Rating
from luban.core.page import render_page

if TYPE_CHECKING:
    from luban.evals.judges.pairwise import Outcome

SHOWN = 30  # matches on the page, for people to read
BODY = """
<section class="tiles">{% for label, value, note in tiles %}<div class="tile"><span>{{ label }}</span><b>{{ value }}</b><em>{{ note }}</em></div>{% endfor %}</section>
<h2>Ratings</h2>
<p class="soft">Bradley–Terry by maximum likelihood, mean 1000; 400 points are odds of 10 to 1. Intervals: bootstrap over matches, 95%. Online Elo (K = 4) depends on the order in which matches are read, and is shown for comparison only.</p>
<div class="card scroll"><table id="ratings"><tr><th>model</th><th class="n">rating</th><th style="width:40%">95%</th><th class="n">score</th><th class="n">matches</th><th class="n">online Elo</th></tr>
{% for r in rows %}<tr><td>{{ r.player }}</td><td class="n">{{ "%.0f"|format(r.rating) }}</td><td>{% if r.low is none %}<span class="soft">none: won or lost all that compares it</span>{% else %}<div class="range" title="{{ "%.0f to %.0f"|format(r.low, r.high) }}"><i style="left:{{ r.left }}%;width:{{ r.width }}%"></i><b style="left:{{ r.place }}%"></b></div>{% endif %}</td><td class="n">{{ "%.1f%%"|format(100 * r.score) }}</td><td class="n">{{ r.games }}</td><td class="n">{{ "%.0f"|format(r.online) }}</td></tr>
{% endfor %}</table></div>
<h2>Predicted scores</h2><p class="soft">How often the model of a row would beat that of a column.</p>
<div class="card scroll"><table><tr><th></th>{% for r in rows %}<th class="n">{{ r.player }}</th>{% endfor %}</tr>
{% for r in rows %}<tr><td>{{ r.player }}</td>{% for p in r.predicted %}<td class="n">{{ "–" if p is none else "%.0f%%"|format(100 * p) }}</td>{% endfor %}</tr>{% endfor %}</table></div>
<h2>Every figure</h2><div class="card scroll"><table>{% for name, value, low, high, n in figures %}<tr><td>{{ name }}</td><td class="n">{{ value }}</td><td class="n" style="width:170px">{% if low is not none %}{{ "%.3f to %.3f"|format(low, high) }}{% endif %}</td><td class="n">{{ n }}</td></tr>{% endfor %}</table></div>
<h2>Matches</h2><p class="soft">The first {{ matches|length }} of {{ total }}. <label>Only where the order changed the verdict: <input type="checkbox" id="turned"></label></p>
<div class="qa">{% for m in matches %}<div class="card match {{ "same" if m.consistent else "turned" }}"><div class="bubble q">{{ m.match.prompt }}</div>
<div class="bubble a">{{ m.match.first }}: {{ m.match.answers[0] }}</div><div class="bubble a">{{ m.match.second }}: {{ m.match.answers[1] }}</div>
<div class="ref"><b>{{ {"first": m.match.first, "second": m.match.second, "tie": "tie", none: "not readable"}[m.verdict] }}</b>{% if not m.consistent %} (the verdict depends on the order){% endif %}{% for o in m.orders if o.text %}<br>{{ o.text }}{% endfor %}</div></div>{% endfor %}</div>
"""
STYLE = """
.range { position: relative; height: 12px; background: var(--line); border-radius: 6px; }
.range i { position: absolute; top: 0; height: 12px; border-radius: 6px; background: var(--a); opacity: .45; min-width: 2px; }
.range b { position: absolute; top: -2px; width: 3px; height: 16px; background: var(--seal); }
td, th { padding-right: 14px; } th.n { text-align: right; }
"""
SCRIPT = """
document.getElementById("turned").addEventListener("change", event => {
  for (const card of document.querySelectorAll(".match.same")) card.hidden = event.target.checked;
});
"""


def leaderboard_page(
    ratings: Sequence[Rating],
    online: Mapping[str, float],
    figures: Mapping[str, Mapping[str, Any]],
    judge: str,
    outcomes: Sequence[Outcome],
) -> str:
    """The page."""
    rows = _rows(ratings, online)
    tiles = [
        ("best", ratings[0].player, f"rating {ratings[0].rating:.0f}"),
        ("matches", len(outcomes), f"judge: {judge}"),
    ]
    for name, label in (("consistent", "same verdict in both orders"), ("human_agreement", "agreement with people")):
        if name in figures:
            tiles.append((label, f"{figures[name]['value']:.0%}", f"n = {figures[name]['n']}"))
    listed = [
        (
            name,
            f"{entry['value']:.4g}" if isinstance(entry["value"], float) else entry["value"],
            *(entry["interval"] or (None, None)),
            entry["n"],
        )
        for name, entry in figures.items()
        if not name.startswith(("rating/", "online_elo/"))
    ]
    return render_page(
        "Leaderboard",
        f"{len(ratings)} models, {len(outcomes)} matches, judged by {judge} in both orders.",
        BODY,
        style=STYLE,
        script=SCRIPT,
        tiles=tiles,
        rows=rows,
        figures=listed,
        matches=outcomes[:SHOWN],
        total=len(outcomes),
    )


def _rows(ratings: Sequence[Rating], online: Mapping[str, float]) -> list[dict[str, Any]]:
    """A row a player: figures, and where its interval stands on the scale of all."""
    known = [each.interval for each in ratings if each.interval]
    low = min((interval[0] for interval in known), default=0.0)
    span = (max((interval[1] for interval in known), default=1.0) - low) or 1.0

    def percent(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    def bar(each: Rating) -> dict[str, Any]:
        if each.interval is None:
            return {"low": None}
        left, right = each.interval
        return {
            "low": left,
            "high": right,
            "left": percent(left),
            "width": round(100 * (right - left) / span, 2),
            "place": min(percent(each.rating), 99.0),
        }

    return [
        {
            "player": each.player,
            "rating": each.rating,
            **bar(each),
            "score": each.score,
            "games": each.games,
            "online": online.get(each.player, START),
            "predicted": [
                None if other is each else 1 / (1 + 10 ** ((other.rating - each.rating) / 400)) for other in ratings
            ],
        }
        for each in ratings
    ]
