"""Runs tasks on one model and writes what they found as an artifact."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from luban.core.artifact import MANIFEST, ArtifactWriter, Parent, as_parent, read_table, write_json
from luban.core.config import to_dict
from luban.core.errors import DataError, UnfinishedError, UsageError
from luban.core.jsonl import read_rows, write_rows
from luban.core.log import say, warn
from luban.corpus.reader import read_corpus
from luban.evals.backends.base import Backend
from luban.evals.backends.endpoint import EndpointBackend
from luban.evals.backends.http import Connection
from luban.evals.backends.local import LocalBackend
from luban.evals.backends.source import local_backend
from luban.evals.checklist import (
    Principles,
    checklist_page,
    checks_of,
    probe_tasks,
    read_principles,
    sign_off_refusal,
)
from luban.evals.harness import HarnessOptions, Loaded, TaskResult, run_task
from luban.evals.judges.base import Judge
from luban.evals.measures import Measure
from luban.evals.names import shipped_tasks
from luban.evals.spec import load_tasks
from luban.evals.store import ResponseStore
from luban.evals.task import TASKS, Material
from luban.load.model import load_model

CHECKLIST = "checklist"  # the task whose probes come from a file of principles


@dataclass(frozen=True, kw_only=True)
class EvalOptions(HarnessOptions):
    """What else an evaluation takes."""

    corpora: tuple[Path, ...] = ()  # whose held-out documents the tasks of `luban.evals.task` measure on
    data: str = ""  # path that takes the place of the tasks' own data
    adapter: str | None = None  # a run of adapters or a PEFT directory, over the model that is measured
    device: str = "auto"  # cpu, cuda, or auto
    precision: str = "float32"  # of the arithmetic; or bfloat16
    batch_tokens: int = 8192  # tokens of a batch, padding included
    batch_invariant: bool = False  # numbers bit for bit those of each request alone
    cache_gb: float | None = None  # memory for keys and values, GB; None: as much as is free
    cache: Path | None = None  # folder of answers that evaluations share
    model_name: str = ""  # the model's name at an endpoint
    api_key: str = ""  # for an endpoint
    timeout: float = 120.0  # seconds that an endpoint has for an answer
    tries: int = 4  # of a request to an endpoint
    principles: Path | None = None  # file of the task checklist; None: the one that ships
    sign_off: str = ""  # who signs the checklist, which is refused where a principle doesn't hold


@dataclass
class Evaluation:
    """What an evaluation found."""

    results: dict[str, dict[str, Any]] = field(default_factory=dict)  # figure → value, interval, n
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: int = 0
    counts: Counter[str] = field(default_factory=Counter)


def open_backend(model_name: str, options: EvalOptions) -> tuple[Backend, tuple[Parent, ...]]:
    """The model behind a name or an address, and the artifact that it is."""
    if model_name.startswith(("http://", "https://")):
        if options.adapter is not None:
            raise UsageError("a server's adapter is asked for by its name (--model-name), not by --adapter")
        connection = Connection(model_name, options.api_key, options.timeout, options.tries)
        return EndpointBackend(connection, model=options.model_name), ()
    model = load_model(model_name, device=device_of(options.device), adapter=options.adapter)
    known = Path(model_name).is_dir() and model.manifest is not None
    backend = local_backend(
        model,
        precision=options.precision,
        batch_tokens=options.batch_tokens,
        batch_invariant=options.batch_invariant,
        cache_bytes=None if options.cache_gb is None else int(options.cache_gb * 1e9),
    )
    parents = (as_parent("model", model_name),) if known else ()
    if options.adapter is not None and (Path(options.adapter) / MANIFEST).is_file():
        parents += (as_parent("adapter", options.adapter),)
    return backend, parents


@dataclass(frozen=True)
class Plan:
    """What is to be measured, read and checked before the model is loaded."""

    built_in: dict[str, Any]  # tasks of `luban.evals.task` by name
    groups: dict[str, list[Loaded]]  # tasks of files, by the name that they were asked for
    principles: Principles | None  # of the task checklist

    @property
    def loaded(self) -> list[Loaded]:
        """The tasks of all groups."""
        return [each for members in self.groups.values() for each in members]

    @property
    def alone(self) -> bool:
        """Whether there is one task only."""
        return len(self.built_in) + len(self.loaded) == 1

    @classmethod
    def of(cls, tasks: Sequence[str], options: EvalOptions, judge: Judge | None) -> Plan:
        """Read the tasks. Raises what `evaluate` says of them."""
        if not tasks:
            raise UsageError(f"name at least one task: {', '.join([*TASKS, *shipped_tasks()])}, or a .toml file")
        built_in = {name: TASKS[name]() for name in tasks if name in TASKS.entries}
        principles = read_principles(options.principles) if CHECKLIST in tasks else None
        if principles is None and (options.principles or options.sign_off):
            raise UsageError("--principles and --sign-off belong to the task checklist: name it")
        named = {
            name: probe_tasks(principles) if principles and name == CHECKLIST else load_tasks(name, options.data)
            for name in tasks
            if name not in TASKS.entries
        }
        if not options.corpora and (needy := [name for name, task in built_in.items() if task.needs]):
            raise UsageError(f"held-out documents are needed by {', '.join(needy)}: pass --corpus DIR")
        names = Counter(name for name in tasks if name in TASKS.entries)
        names.update(each.name for name in tasks for each in named.get(name, ()))
        if twice := next((name for name, count in names.items() if count > 1), None):
            raise UsageError(f"the task {twice} is named twice")
        graded = [each.name for members in named.values() for each in members if each.spec.kind.needs_judge]
        if graded and judge is None:
            raise UsageError(
                f"answers to {graded[0]} are graded by a judge: give --judge MODEL, rule:NAME or an address"
            )
        groups = {name: [Loaded.of(task, options) for task in members] for name, members in named.items()}
        return cls(built_in, groups, principles)

    def config(self, options: EvalOptions, backend: Backend, judge: Judge | None) -> dict[str, Any]:
        """What the evaluation's numbers depend on."""
        files = {each.task.name: {"spec": to_dict(each.task.spec), "data": each.identity} for each in self.loaded}
        return {
            "tasks": {name: {} for name in self.built_in} | files,
            **{name: getattr(options, name) for name in ("limit", "precision", "seed", "chat")},
            "contamination": [str(path) for path in options.contamination],
            "model": backend.identity,
            "judge": judge.identity if judge else "",
        }


def evaluate(
    model_name: str, tasks: Sequence[str], out: Path, options: EvalOptions, judge: Judge | None = None
) -> Evaluation:
    """Measure a model.

    Args:
        model_name: anything `load_model` takes, or the address of an OpenAI-compatible endpoint.
        tasks: names in `TASKS`, shipped task files, .toml files, .yaml files of lm-evaluation-harness.
        judge: for tasks of kind judge.

    Returns:
        Figures and rows. `out` holds results.json, answers.jsonl, responses.jsonl (what was asked and answered) and, of tasks
        in `TASKS`, figures.json and TASK.jsonl.

    Raises:
        UsageError: no task, or one without the material it needs. ConfigError: a task that isn't right.
        DataError: data that isn't. UnfinishedError: an endpoint left items unanswered; they are asked again by the next run.
    """
    plan = Plan.of(tasks, options, judge)
    backend, parents = open_backend(model_name, options)
    if plan.built_in and not isinstance(backend, LocalBackend):
        raise UsageError(f"{', '.join(plan.built_in)} need a local model, not an endpoint")
    writer = ArtifactWriter(
        out,
        kind="evaluation",
        config=plan.config(options, backend, judge),
        parents=parents + tuple(as_parent("corpus", path) for path in options.corpora),
        settings={"about": backend.about(), "sign_off": options.sign_off},
        resumable=True,
    )
    if writer.finished():
        say(f"{out} is finished: its figures, nothing is asked again")
        return Evaluation(read_table(out / "results.json"), [row for _, row in read_rows(out / "answers.jsonl")])
    refusal = ""
    with writer as art:
        found, figures = _measured(plan, backend, options, judge, art.path)
        if plan.principles:
            checks = checks_of(plan.principles, found.rows)
            refusal = sign_off_refusal(checks, options.sign_off)
            page = checklist_page(plan.principles, checks, backend.about(), "" if refusal else options.sign_off)
            (art.path / "checklist.html").write_text(page, encoding="utf-8")
        write_json(art.path / "results.json", found.results)
        write_rows(art.path / "answers.jsonl", found.rows)
        figures |= {name: entry["value"] for name, entry in found.results.items() if name not in figures}
        write_json(art.path / "figures.json", figures)
        art.note(**figures, **{name: count for name, count in found.counts.items() if count})
        if found.failed:
            raise UnfinishedError(
                f"{found.failed} of {len(found.rows)} items have no answer "
                f"({next(row['error'] for row in found.rows if row.get('error'))}); the other figures are in {art.path}, and the "
                f"same command asks again for what is missing"
            )
    if refusal:
        raise DataError(f"{refusal} (see {out / 'checklist.html'})")
    return found


def _measured(
    plan: Plan, backend: Backend, options: EvalOptions, judge: Judge | None, folder: Path
) -> tuple[Evaluation, dict[str, Any]]:
    """(what all tasks found, the figures of those in `TASKS`); their files are written to `folder`."""
    found = Evaluation()
    figures: dict[str, Any] = {}
    if plan.built_in:
        material = gather(options.corpora)
        for name, task in plan.built_in.items():
            if task.needs and not getattr(material, task.needs):
                raise DataError(f"{name} needs held-out {task.needs}: {', '.join(map(str, options.corpora))} hold none")
        for name, task in plan.built_in.items():
            figures |= _built_in(name, task, backend, material, options, folder, found)
    if plan.groups:
        with ResponseStore(folder / "responses.jsonl", backend.identity, options.cache) as store:
            _groups(plan.groups, plan.alone, backend, store, options, judge, found)
    found.counts.update(backend.counts)
    return found, figures


def _groups(
    groups: dict[str, list[Loaded]],
    alone: bool,
    backend: Backend,
    store: ResponseStore,
    options: EvalOptions,
    judge: Judge | None,
    found: Evaluation,
) -> None:
    for group, members in groups.items():
        results = []
        for loaded in members:
            began = time.perf_counter()
            result = run_task(loaded, backend, store, options, judge)
            say(f"{result.name}: {len(result.rows)} items in {time.perf_counter() - began:.1f} s")
            results.append(result)
            found.rows += result.rows
            found.failed += result.failed
            found.counts.update({name: count for name, count in result.notes.items() if count})
            found.results |= _entries(result.name, result.measures, alone)
        if len(members) > 1:
            found.results |= _entries(group.removesuffix(".toml"), _together(members, results), False)


def _entries(task: str, measures: Sequence[Measure], alone: bool) -> dict[str, dict[str, Any]]:
    """Figures by name; where there are several tasks each behind its task's."""
    return {
        m.name if alone else f"{Path(task).name}/{m.name}": {**m.to_json(), "task": Path(task).name, "metric": m.name}
        for m in measures
    }


def _together(members: Sequence[Loaded], results: Sequence[TaskResult]) -> list[Measure]:
    """The figures of all items of a group together, where its tasks have the same ones."""
    rows = [row for result in results for row in result.rows if row.get("scores") is not None]
    figures = {tuple(sorted(name for name in result.rows[0]["scores"] or ())) for result in results if result.rows}
    if not rows or len(figures) > 1 or len({type(each.task.spec.kind) for each in members}) > 1:
        warn("the tasks of the group have different figures, so it has none of its own")
        return []
    return members[0].task.spec.kind.measures(rows)


def _built_in(
    name: str, task: Any, backend: Backend, material: Material, options: EvalOptions, folder: Path, found: Evaluation
) -> dict[str, Any]:
    assert isinstance(backend, LocalBackend)
    began = time.perf_counter()
    outcome = task.run(backend.model, material, limit=options.limit, precision=options.precision)
    say(f"{name}: {time.perf_counter() - began:.1f} s")
    rows = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in outcome.items)
    (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    found.rows += [{"task": name, "item": item.get("id", str(n)), **item} for n, item in enumerate(outcome.items)]
    n = len(outcome.items)
    found.results |= {
        figure: {"value": value, "interval": None, "n": n, "task": name, "metric": figure}
        for figure, value in outcome.figures.items()
    }
    return outcome.figures


def gather(corpora: Sequence[Path]) -> Material:
    """The held-out documents of the corpora, plain ones apart from conversations."""
    material = Material()
    for path in corpora:
        for document in read_corpus(path, split="heldout"):
            (material.conversations if document.messages else material.text).append(document)
    return material


def device_of(name: str) -> str:
    """A device by name; auto: CUDA where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
