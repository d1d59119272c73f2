"""One task on one model: items, shots, requests, scores, figures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luban.core.errors import ConfigError
from luban.evals.backends.base import Backend
from luban.evals.contamination import contaminated, texts_of
from luban.evals.data import read_task
from luban.evals.judges.base import Judge, grade_rows
from luban.evals.kinds.base import Example
from luban.evals.kinds.generate import Writing
from luban.evals.measures import Measure, mean_of
from luban.evals.prompts import build_prompt, choose_shots
from luban.evals.requests import Failed, Request
from luban.evals.spec import Chat, Task
from luban.evals.store import ResponseStore, answer_all


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """How tasks are run, whatever they are."""

    shots: int | None = None  # worked examples; None: as the task says
    limit: int = 0  # items of a task, its first ones; 0: all
    seed: int = 0  # of shots and samples
    chat: Chat = "off"  # chat template around prompts
    repeats: int | None = None  # answers to each item; None: as the task says
    temperature: float | None = None  # of written answers, 0: greedy; None: as the task says
    contamination: tuple[Path, ...] = ()  # corpora and files that items are looked for in

    def __post_init__(self):
        if self.limit < 0 or (self.shots is not None and self.shots < 0):
            raise ConfigError(f"--limit and --shots are numbers from 0, {self.limit} and {self.shots} given")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature is a number from 0, {self.temperature:g} given")

    def applied(self, task: Task) -> Task:
        """The task with the options that take the place of its own settings. Raises ConfigError where they make no sense."""
        changes: dict[str, Any] = {}
        if self.shots is not None and task.spec.kind.has_prompts:
            changes["shots"] = self.shots
        if isinstance(kind := task.spec.kind, Writing):
            if self.repeats is not None:
                changes["repeats"] = self.repeats
            if self.temperature is not None:
                changes["kind"] = replace(kind, temperature=self.temperature)
        return replace(task, spec=replace(task.spec, **changes))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A task with its items."""

    task: Task
    items: list[Example]
    pool: list[Example]  # what shots are chosen from
    own: bool  # whether that is all of the task's items
    identity: str  # SHA-256 of the data

    @classmethod
    def of(cls, task: Task, options: HarnessOptions) -> Loaded:
        """Read the data. Raises DataError as `read_task` does."""
        task = options.applied(task)
        items, pool, identity = read_task(task)
        kept = items[: options.limit or None]
        return cls(task=task, items=kept, pool=pool or items, own=not pool, identity=identity)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Figures of a task and the rows behind them."""

    name: str
    measures: list[Measure]
    rows: list[dict[str, Any]]  # one an item
    failed: int = 0  # items without an answer
    notes: dict[str, Any] = field(default_factory=dict)


def run_task(
    loaded: Loaded, backend: Backend, store: ResponseStore, options: HarnessOptions, judge: Judge | None = None
) -> TaskResult:
    """Ask what isn't known yet, and score everything.

    Raises:
        DataError: a shot that is the item itself, too few shots, a prompt that doesn't fit.
        UnfinishedError: the backend stopped answering after some answers were kept.
    """
    task = loaded.task
    asked: list[list[Request]] = []
    rows: list[dict[str, Any]] = []
    for example in loaded.items:
        shots = choose_shots(task, example, task.spec.shots, loaded.pool, loaded.own, options.seed)
        prompt, delimiter = build_prompt(task, shots, example, options.chat)
        asked.append(task.spec.kind.requests(example, prompt, delimiter, task.spec.repeats, options.seed))
        prompted = task.spec.kind.has_prompts
        seen = backend.seen(prompt) if prompted and prompt else ""
        rows.append(
            {
                "task": task.name,
                "item": example.id,
                "prompt": seen,
                "question": example.question,
                "shots": [shot.id for shot in shots],
            }
        )
    answers = answer_all([request for each in asked for request in each], backend, store, task.name)
    failed = 0
    for example, requests, row in zip(loaded.items, asked, rows, strict=True):
        responses = [answers[request.key("")] for request in requests]
        broken = [each.error for each in responses if isinstance(each, Failed)]
        if broken:
            row |= {"answer": None, "error": broken[0], "scores": None}
            failed += 1
        else:
            row |= task.spec.kind.score(example, responses)
        if task.spec.group_by:
            row["group"] = str(example.row.get(task.spec.group_by))
        if task.spec.same_by:
            row["same"] = str(example.row.get(task.spec.same_by))
    notes: dict[str, Any] = {}
    if judge is not None and task.spec.kind.needs_judge:
        notes |= grade_rows(judge, loaded.items, rows)
    if options.contamination:
        _mark_contaminated(loaded.items, rows, options.contamination)
        notes["too_short_for_contamination"] = sum(row["contaminated"] is None for row in rows)
    scored = [row for row in rows if row.get("scores") is not None]
    return TaskResult(name=task.name, measures=_measures(task, scored), rows=rows, failed=failed, notes=notes)


def _measures(task: Task, rows: Sequence[dict[str, Any]]) -> list[Measure]:
    if not rows:
        return []
    found = list(task.spec.kind.measures(rows))
    found += _contamination(task, rows)
    if task.spec.same_by:
        found.append(_flips(rows))
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "group" in row:
            groups[row["group"]].append(row)
    for name, members in sorted(groups.items()):
        found += [replace(m, name=f"{m.name}/{name}") for m in task.spec.kind.measures(members)]
    return found


def _contamination(task: Task, rows: Sequence[dict[str, Any]]) -> list[Measure]:
    """The fraction of items that are contaminated, of those long enough to tell, and the figures of those that aren't."""
    told = [row for row in rows if row.get("contaminated") is not None]
    if not told:
        return []
    share = mean_of(
        [{"scores": {"contaminated": float(row["contaminated"])}} for row in told], "contaminated", better="lower"
    )
    clean = [row for row in told if not row["contaminated"]]
    return [share, *(replace(m, name=f"{m.name}_clean") for m in (task.spec.kind.measures(clean) if clean else ()))]


def _flips(rows: Sequence[dict[str, Any]]) -> Measure:
    """The fraction of questions whose rephrasings don't all have the same first score."""
    questions: dict[str, set[float]] = defaultdict(set)
    for row in rows:
        questions[row["same"]].add(next(iter(row["scores"].values())))
    flipped = [{"scores": {"flips": float(len(scores) > 1)}} for scores in questions.values()]
    return mean_of(flipped, "flips", better="lower")


def _mark_contaminated(items: Sequence[Example], rows: Sequence[dict[str, Any]], paths: Sequence[Path]) -> None:
    texts = ["\n".join((item.question, *item.references, *item.choices)) for item in items]
    for row, flag in zip(rows, contaminated(texts, texts_of(paths)), strict=True):
        row["contaminated"] = flag
