"""Evaluations beside each other, item by item: differences with intervals and p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from luban.core.artifact import Manifest
from luban.core.metrics.bootstrap import interval, sign_flip_p_value
from luban.core.resuming import differences
from luban.report.gather import Found, read_items

SIZES = frozenset({"nats", "bytes", "words", "tokens", "items"})  # scores that others are made of
LOWER = frozenset({"brier", "bits_per_byte", "nats_per_token"})  # scores of which less is better
SHOWN = 12  # items on which two evaluations differ, for people to read
SETTINGS = ("limit", "seed", "chat", "precision", "contamination")  # of an evaluation, beside its tasks


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One score of one task, of all items that both evaluations have scored, or of one group of them."""

    task: str
    score: str  # of a group: score/group, as evaluations name it
    first: float  # means
    second: float
    interval: tuple[float, float]  # of the mean of second - first: bootstrap over items, 95%
    p_value: float  # two-sided, by random signs of the differences
    n: int

    @property
    def difference(self) -> float:
        """second - first."""
        return self.second - self.first

    @property
    def verdict(self) -> str:
        """Which is better, where that is unlikely to be chance (p below 0.05)."""
        if self.p_value >= 0.05 or not self.difference:
            return "no difference shown"
        return "second" if (self.difference > 0) != (self.score.partition("/")[0] in LOWER) else "first"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations."""

    first: str
    second: str
    differences: list[Difference]
    apart: dict[str, int]  # task → items that only one of them has scored
    cautions: list[str] = field(
        default_factory=list
    )  # settings in which they differ, so that numbers can't be compared as they are
    changed: list[dict[str, Any]] = field(default_factory=list)  # items whose first score differs most
    groups: list[Difference] = field(default_factory=list)  # of the items with one value of a task's `group_by`


def compare(evaluations: Sequence[Found]) -> list[Comparison]:
    """Each evaluation but the first beside the first; none that share no scored item."""
    rows = [_scored(found) for found in evaluations]
    pairs = zip(evaluations[1:], rows[1:], strict=True)
    found = [_pair(evaluations[0], rows[0], other, theirs) for other, theirs in pairs] if evaluations else []
    return [each for each in found if each.differences]


def _scored(found: Found) -> dict[str, dict[str, dict[str, Any]]]:
    """Task → item → its row, of the items that have scores."""
    tasks: dict[str, dict[str, dict[str, Any]]] = {}
    for row in read_items(found.path / "answers.jsonl"):
        if row.get("scores"):
            tasks.setdefault(row["task"], {})[row["item"]] = row
    return tasks


def _pair(first: Found, a: Mapping[str, Any], second: Found, b: Mapping[str, Any]) -> Comparison:
    found: list[Difference] = []
    by_group: list[Difference] = []
    apart: dict[str, int] = {}
    changed: list[dict[str, Any]] = []
    for task in [name for name in a if name in b]:
        shared = [item for item in a[task] if item in b[task]]
        if alone := len(a[task].keys() ^ b[task].keys()):
            apart[task] = alone
        if not shared:
            continue
        names = [n for n in a[task][shared[0]]["scores"] if n not in SIZES]
        names = [n for n in names if all(n in each[task][item]["scores"] for item in shared for each in (a, b))]
        groups = _groups(a[task], b[task], shared)
        for name in names:
            found.append(_difference(task, name, a[task], b[task], shared))
            for group, items in groups.items():
                each = _difference(task, name, a[task], b[task], items)
                by_group.append(replace(each, score=f"{name}/{group}"))
        if names:
            changed += _changed(task, names[0], a[task], b[task], shared)
    changed.sort(key=lambda each: -abs(each["change"]))
    cautions = _cautions(first.manifest, second.manifest)
    return Comparison(
        first=first.name,
        second=second.name,
        differences=found,
        apart=apart,
        cautions=cautions,
        changed=changed[:SHOWN],
        groups=by_group,
    )


def _difference(task: str, score: str, a: Mapping[str, Any], b: Mapping[str, Any], items: Sequence[str]) -> Difference:
    """Of one score over these items."""
    ours, theirs = (np.array([rows[item]["scores"][score] for item in items]) for rows in (a, b))
    return Difference(
        task=task,
        score=score,
        first=float(ours.mean()),
        second=float(theirs.mean()),
        interval=interval((theirs - ours).tolist()),
        p_value=sign_flip_p_value((theirs - ours).tolist()),
        n=len(items),
    )


def _groups(a: Mapping[str, Any], b: Mapping[str, Any], items: Sequence[str]) -> dict[str, list[str]]:
    """Group → its items, of those that both evaluations have in the same one."""
    found: dict[str, list[str]] = {}
    for item in items:
        group = a[item].get("group")
        if group is not None and group == b[item].get("group"):
            found.setdefault(group, []).append(item)
    return dict(sorted(found.items()))


def _changed(
    task: str, score: str, a: Mapping[str, Any], b: Mapping[str, Any], items: Sequence[str]
) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "item": item,
            "prompt": a[item].get("prompt") or str(a[item].get("reference", ""))[:300],
            "first": a[item].get("answer"),
            "second": b[item].get("answer"),
            "score": score,
            "change": b[item]["scores"][score] - a[item]["scores"][score],
        }
        for item in items
        if a[item]["scores"][score] != b[item]["scores"][score]
    ]


def _cautions(first: Manifest, second: Manifest) -> list[str]:
    """Settings in which two evaluations differ beside the model."""
    tasks = [{name: manifest.config.get(name) for name in SETTINGS} for manifest in (first, second)]
    said = [f"{path}: {old!r} and {new!r}" for path, old, new in differences(tasks[0], tasks[1])]
    ours, theirs = ((m.config.get("tasks") or {}) for m in (first, second))
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for name in [task for task in ours if task in theirs]:
            for path, old, new in differences(ours[name], theirs[name]):
                was, now = ("other data", "") if path == "data" else (f"{old!r:.40}", f"{new!r:.40}")
                said.append(f"{name}.{path}: {was}{' and ' * bool(now)}{now}")
    about = [(m.settings.get("about") or {}).get("begins_with_bos") for m in (first, second)]
    if None not in about and about[0] != about[1]:
        said.append(f"begins_with_bos: {about[0]} and {about[1]}")
    return said


def lines_of(comparison: Comparison) -> list[str]:
    """A comparison as lines for the terminal."""
    lines = [f"{comparison.second} against {comparison.first}"]
    for each in [*comparison.differences, *comparison.groups]:
        low, high = each.interval
        lines.append(
            f"  {each.task + '/' + each.score:<32} {each.first:.4f} → {each.second:.4f}  "
            f"{each.difference:+.4f} [{low:+.4f}, {high:+.4f}]  p = {each.p_value:.4f}  n = {each.n}  {each.verdict}"
        )
    lines += [f"  only one of them has {count} items of {task}" for task, count in comparison.apart.items()]
    return lines + [f"  they differ in {caution}" for caution in comparison.cautions]
