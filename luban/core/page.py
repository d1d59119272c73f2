"""Self-contained HTML pages: one style, no request to anywhere."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

LAYOUT = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title><style>
{{ style }}{{ extra_style }}</style></head>
<body><main><header><div><h1>{{ title }}</h1><p class="lead" style="margin:4px 0 0">{{ lead }}</p></div></header>
{{ body }}
<footer>Written by Luban.</footer></main>{% if script %}<script>
{{ script }}</script>{% endif %}</body></html>
"""


@lru_cache(maxsize=1)
def page_style() -> str:
    """The style sheet that all pages share."""
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def environment() -> jinja2.Environment:
    """Templates that escape what they are given and refuse unknown names."""
    return jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)


def render_page(title: str, lead: str, body: str, *, style: str = "", script: str = "", **values: Any) -> str:
    """A page.

    Args:
        body: a Jinja template of what stands below the heading, over `values`.
        style, script: further CSS, and JavaScript that runs at the end.
    """
    made = environment()
    filled = Markup(made.from_string(body).render(**values))
    return made.from_string(LAYOUT).render(
        title=title,
        lead=lead,
        style=Markup(page_style()),
        extra_style=Markup(style),
        body=filled,
        script=Markup(script),
    )
