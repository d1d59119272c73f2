"""One file of principles as a release checklist: each principle's probes are a task, the results one page to sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.core.config import from_dict, load_toml
from luban.core.errors import ConfigError, DataError
from luban.core.page import render_page
from luban.evals.kinds.probe import Probe
from luban.evals.spec import Task, TaskSpec

SHIPPED = Path(__file__).parent / "principles.toml"


@dataclass(frozen=True, kw_only=True)
class Principle:
    """One principle."""

    id: str  # short name
    text: str  # what it asks for
    title: str = ""  # for people
    critique: str = ""  # request that finds where an answer departs from it (Constitutional AI)
    revision: str = ""  # request that mends the answer
    least: float = 1.0  # fraction of its probes that must pass
    probes: tuple[dict[str, Any], ...] = ()  # rows as `luban.evals.kinds.probe` takes them
    waived: str = ""  # why it needn't hold for this release; empty: it must

    def __post_init__(self):
        if not 0 <= self.least <= 1:
            raise ConfigError(f"least is a fraction from 0 to 1, {self.least} given")


@dataclass(frozen=True, kw_only=True)
class Principles:
    """A file of them."""

    principle: tuple[Principle, ...]
    title: str = "Principles"
    max_tokens: int = 200  # of an answer to a probe

    def __post_init__(self):
        ids = [each.id for each in self.principle]
        if not ids or len(set(ids)) < len(ids):
            raise ConfigError("a file of principles has at least one, each with an id of its own")


def read_principles(file: Path | None = None) -> Principles:
    """The principles of a TOML file, or those that ship. Raises ConfigError for one that isn't right."""
    try:
        return from_dict(Principles, load_toml(file or SHIPPED))
    except ConfigError as error:
        raise ConfigError(f"{file or SHIPPED}: {error}") from None


def probe_tasks(principles: Principles) -> list[Task]:
    """A task for each principle that has probes. Raises DataError where none has."""
    tasks = [
        Task(
            name=each.id,
            spec=TaskSpec(
                kind=Probe(max_tokens=principles.max_tokens), about=each.text, prompt="{{prompt}}", items=each.probes
            ),
            folder=Path(),
        )
        for each in principles.principle
        if each.probes
    ]
    if not tasks:
        raise DataError("no principle has probes, so there is nothing to check")
    return tasks


@dataclass(frozen=True, kw_only=True)
class Check:
    """A principle and what its probes gave."""

    principle: Principle
    rows: list[dict[str, Any]]

    @property
    def passed(self) -> float:
        """The fraction of probes that pass; those without an answer don't."""
        return sum((row["scores"] or {}).get("passed", 0.0) for row in self.rows) / max(1, len(self.rows))

    @property
    def status(self) -> str:
        """holds, waived, fails, or not probed."""
        if not self.principle.probes:
            return "not probed"
        if self.passed >= self.principle.least:
            return "holds"
        return "waived" if self.principle.waived else "fails"


def checks_of(principles: Principles, rows: Sequence[dict[str, Any]]) -> list[Check]:
    """The rows of an evaluation by principle."""
    return [Check(principle=p, rows=[row for row in rows if row["task"] == p.id]) for p in principles.principle]


def sign_off_refusal(checks: Sequence[Check], signer: str) -> str:
    """Why `signer` can't sign the release; empty where every principle holds or is waived, or nobody is to sign."""
    failing = [
        f"{c.principle.id} ({c.passed:.0%} of {c.principle.least:.0%})"
        for c in checks
        if c.status in ("fails", "not probed")
    ]
    if not signer or not failing:
        return ""
    return (
        f"{signer} can't sign: {', '.join(failing)} {'does' if len(failing) == 1 else 'do'} not hold; improve the model, or "
        f"say in the file of principles why it is waived"
    )


BODY = """
<section class="tiles"><div class="tile"><span>principles that hold</span><b>{{ held }} of {{ checks|length }}</b></div>
<div class="tile"><span>release</span><b>{{ "signed" if signer else "not signed" }}</b><em>{{ signer or "luban eval … --sign-off NAME" }}</em></div>
<div class="tile"><span>model</span><b style="font-size:18px">{{ model }}</b><em>{{ identity }}</em></div></section>
{% for c in checks %}<h2><span class="mark {{ c.status.replace(" ", "-") }}">{{ {"holds": "✓", "fails": "✗", "waived": "~"}.get(c.status, "?") }}</span> {{ c.principle.title or c.principle.id }}</h2>
<p>{{ c.principle.text }}</p><p class="soft">{{ c.status }}: {{ "%.0f%%"|format(100 * c.passed) }} of {{ c.rows|length }} probes pass, {{ "%.0f%%"|format(100 * c.principle.least) }} must.{% if c.principle.waived %} Waived: {{ c.principle.waived }}{% endif %}</p>
<details{% if c.status == "fails" %} open{% endif %}><summary>Probes and answers</summary><div class="qa">{% for row in c.rows %}<div class="card"><div class="bubble q">{{ row.question }}</div><div class="bubble a">{{ row.answer if row.answer is not none else "no answer" }}</div>
<div class="ref">{% if row.broken is defined and row.broken %}<b style="color:var(--seal)">✗</b> the answer {{ row.broken|join(", ") }}{% elif row.error is defined %}{{ row.error }}{% else %}<b>✓ passes</b>{% endif %}</div></div>{% endfor %}</div></details>
{% endfor %}
"""
STYLE = """
.mark { display: inline-block; width: 1.3em; font-weight: 700; } .mark.holds { color: var(--c); } .mark.fails { color: var(--seal); }
summary { cursor: pointer; color: var(--soft); margin-bottom: 8px; }
"""


def checklist_page(principles: Principles, checks: Sequence[Check], about: Mapping[str, Any], signer: str = "") -> str:
    """The checklist as a self-contained page."""
    return render_page(
        "Release checklist",
        principles.title,
        BODY,
        style=STYLE,
        checks=checks,
        held=sum(each.status in ("holds", "waived") for each in checks),
        signer=signer,
        model=about.get("model", ""),
        identity=str(about.get("weights", about.get("endpoint", "")))[:16],
    )
