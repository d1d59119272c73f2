"""The rows of a task: from files in plain or public formats, corpora, or generators."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from luban.core.artifact import MANIFEST, read_manifest
from luban.core.errors import ConfigError, DataError
from luban.core.hashing import data_sha256, file_sha256
from luban.core.jsonl import read_rows
from luban.corpus.arrow import require_pyarrow
from luban.corpus.reader import read_corpus
from luban.evals.formats import FORMATS
from luban.evals.generated import GENERATORS
from luban.evals.kinds.base import Example
from luban.evals.spec import Task, TaskSpec
from luban.evals.templates import text_of

SUFFIXES = (".jsonl", ".parquet", ".json", ".csv", ".jsonl.gz")
Rows = list[tuple[str, dict[str, Any]]]  # (where a row stands, for errors; the row)


def read_task(task: Task) -> tuple[list[Example], list[Example], str]:
    """(items, what shots are chosen from, SHA-256 of all data). The second is empty where it is the items themselves.

    Raises:
        DataError: no data, no items, or a row that lacks what the task needs; names the row.
    """
    spec = task.spec
    if spec.generated:
        made = GENERATORS[spec.generated.name]
        rows: Rows = [(f"item {n}", row) for n, row in enumerate(made(spec.generated))]
        identity = data_sha256([spec.generated.name, [row for _, row in rows]])
    elif spec.items:
        rows = [(f"item {n}", dict(row)) for n, row in enumerate(spec.items)]
        identity = data_sha256([row for _, row in rows])
    elif spec.data:
        path = _located(task, spec.data, spec.split)
        rows, identity = _rows(path, spec.format, spec.split), _identity(path)
    else:
        where = f" ({spec.source})" if spec.source else ""
        raise DataError(f"task {task.name} brings no data{where}: give --data FILE")
    items = examples(task, rows)
    if not items:
        raise DataError(f"task {task.name} has no items: {spec.data or spec.generated}")
    shots: list[Example] = []
    if spec.fixed_shots:
        shots = examples(task, [(f"fixed shot {n}", dict(row)) for n, row in enumerate(spec.fixed_shots)])
    elif spec.shot_data or spec.shot_split:
        path = _located(task, spec.shot_data or spec.data, spec.shot_split)
        shots = examples(task, _rows(path, spec.format, spec.shot_split))
        identity = data_sha256([identity, _identity(path)])
    return items, shots, identity


def examples(task: Task, rows: Rows) -> list[Example]:
    """Rows as items. Raises DataError for a row that isn't right, and for an id that two rows have."""
    found, seen = list[Example](), dict[str, str]()
    fields = {name for _, row in rows for name in row}
    templates = {name: value for name, value in _templates(task.spec).items() if value in fields}
    for number, (where, row) in enumerate(rows):
        try:
            for name, field in templates.items():
                if field not in row:  # the template would be read as text
                    raise DataError(f"the field {field!r}, which other rows have and {name} names, isn't there")
            id = _id(task.spec, row, number)
            found.append(task.spec.kind.read(task.spec, row, id))
        except ConfigError as error:
            raise ConfigError(f"task {task.name}: {error}") from None
        except DataError as error:
            raise DataError(f"task {task.name}, {where}: {error}") from None
        if id in seen:
            raise DataError(f"task {task.name}, {where}: the id {id!r} is that of {seen[id]} already")
        seen[id] = where
    return found


def _templates(spec: TaskSpec) -> dict[str, str]:
    """The task's templates that are single texts."""
    found = {"prompt": spec.prompt, "target": spec.target, "id": spec.id, "choices": getattr(spec.kind, "choices", "")}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _id(spec: TaskSpec, row: dict[str, Any], number: int) -> str:
    return text_of(spec.id, row) if spec.id else str(number)


def _located(task: Task, name: str, split: str) -> Path:
    path = task.path(name)
    if path.is_dir() and not (path / MANIFEST).is_file() and split:
        folder, path = path, next((path / f"{split}{s}" for s in SUFFIXES if (path / f"{split}{s}").is_file()), path)
        if path is folder:
            raise DataError(f"task {task.name}: {folder} has no {split}.jsonl, .parquet, .json or .csv")
    return path


def _identity(path: Path) -> str:
    if (path / MANIFEST).is_file():
        return read_manifest(path).content_hash
    if path.is_dir():
        return data_sha256([[str(p.relative_to(path)), file_sha256(p)] for p in sorted(path.rglob("*")) if p.is_file()])
    parts = [path] if path.exists() else [Path(part) for part in str(path).split("+")]
    return data_sha256([file_sha256(part) for part in parts])


def _rows(path: Path, form: str, split: str) -> Rows:
    if form != "rows":
        return [(f"{path.name}, item {n}", row) for n, row in enumerate(FORMATS[form](path), 1)]
    if (path / MANIFEST).is_file():
        documents = read_corpus(path, split or "heldout")
        return [
            (f"{path} document {d.id}", {"id": d.id, "text": d.text, "messages": d.messages, **(d.meta or {})})
            for d in documents
        ]
    if not path.is_file():
        raise DataError(f"{path} is {'a folder: name a split' if path.is_dir() else 'not there'}")
    return [(f"{path}:{n}", row) for n, row in _file_rows(path)]


def _file_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".parquet":
        _, parquet = require_pyarrow("reading Parquet items")
        yield from enumerate(parquet.read_table(path).to_pylist(), 1)
    elif path.suffix == ".csv":
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield from enumerate(csv.DictReader(file), 2)
    elif path.suffix == ".json":
        yield from enumerate(_objects(path), 1)
    else:
        yield from read_rows(path)


def _objects(path: Path) -> Sequence[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    found = found.get("data") if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise DataError(f"{path} holds no list of objects")
    return found
