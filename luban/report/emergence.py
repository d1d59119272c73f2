"""A page of what grows with size along a ladder of models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from luban.core.page import render_page
from luban.core.units import count
from luban.report.chart import Chart, Series, draw

CHARTS = {  # title → (what it shows, curves)
    "Learning in context": (
        "Accuracy on the next pair of a drawn rule, with and without pairs before it.",
        ("no examples", "with examples", "gain in context"),
    ),
    "Writing steps": (
        "Accuracy of the last digit of a sum, said at once or behind partial sums that the model writes first.",
        ("answer at once", "answer after steps", "gain by steps"),
    ),
    "One ability, two metrics": (
        "Additions of three digits: answers that are right as a whole, and the geometric mean likelihood of an answer's token.",
        ("whole answer right", "likelihood of a token"),
    ),
}
STYLE = """.curve { fill: none; stroke-width: 2; }
.curve.a { stroke: var(--a); } .curve.b { stroke: var(--b); } .curve.c { stroke: var(--c); }
.dot.a { fill: var(--a); } .dot.b { fill: var(--b); } .dot.c { fill: var(--c); }
.key.a { color: var(--a); } .key.b { color: var(--b); } .key.c { color: var(--c); }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
"""
BODY = """
{% for s in sections %}<h2>{{ s.title }}</h2><p class="soft">{{ s.about }}</p>
<div class="card">{{ s.svg }}<p>{% for tone, name in s.curves %}<span class="key {{ tone }}">■ {{ name }}</span> {% endfor %}</p></div>
<table><tr><th>parameters</th>{% for _, name in s.curves %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in s.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>{% if s.note %}<p class="soft">{{ s.note }}</p>{% endif %}
{% endfor %}"""


def emergence_page(sizes: Sequence[float], found: Mapping[str, Sequence[float]], sharp: Mapping[str, float]) -> str:
    """The page: three charts over the logarithm of the parameters, each with its table.

    Args:
        sizes: parameters of each model, ascending.
        found: name → a value a model (`luban.evals.emergence.growth`).
        sharp: name → sharpness (`luban.evals.emergence.sharpness`) of the curves that it is told of.
    """
    sections = []
    for title, (about, names) in CHARTS.items():
        keys = list(zip("abc", names, strict=False))
        series = [
            Series(name, [(math.log10(n), y) for n, y in zip(sizes, found[name], strict=True)], tone, dots=True)
            for tone, name in keys
        ]
        told = [f"{name} {sharp[name]:.2f}" for name in names if name in sharp]
        note = f"largest step between neighbours as a fraction of the range: {', '.join(told)}" if told else ""
        rows = [[count(n), *(f"{found[name][i]:.3f}" for name in names)] for i, n in enumerate(sizes)]
        svg = Markup(draw(Chart(title, "log10 of parameters", "fraction", series)))
        sections.append({"title": title, "about": about, "svg": svg, "curves": keys, "rows": rows, "note": note})
    lead = f"{len(sizes)} models of {count(sizes[0])} to {count(sizes[-1])} parameters without embeddings, one recipe."
    return render_page("What grows with size", lead, BODY, style=STYLE, sections=sections)
