"""Runs tasks on one model and writes what they found as an artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from luban.core.artifact import ArtifactWriter, as_parent, write_json
from luban.core.errors import UsageError
from luban.core.log import say
from luban.corpus.reader import read_corpus
from luban.evals.task import TASKS, Material
from luban.load.model import LoadedModel, load_model


def evaluate(
    model_name: str,
    tasks: Sequence[str],
    out: Path,
    *,
    corpora: Sequence[Path] = (),
    limit: int = 0,
    device: str = "auto",
    precision: str = "float32",
) -> dict[str, Any]:
    """Measure a model.

    Args:
        model_name: anything `load_model` takes. tasks: names in `TASKS`.
        corpora: corpora whose held-out documents are measured on. limit: items a task (0: all).

    Returns:
        The figures of all tasks. `out` holds figures.json and TASK.jsonl (the items).

    Raises:
        UsageError: no task, or one without the material it needs. ConfigError: an unknown task.
    """
    chosen = {name: TASKS[name]() for name in tasks}
    if not chosen:
        raise UsageError(f"name at least one task: {', '.join(TASKS)}")
    if not corpora and (needy := [name for name, task in chosen.items() if task.needs]):
        raise UsageError(f"{', '.join(needy)} need held-out documents: pass --corpus DIR")
    parents = [as_parent("corpus", path) for path in corpora]
    model = load_model(model_name, device=_device(device))
    if Path(model_name).is_dir() and model.manifest is not None:
        parents.append(as_parent("model", model_name))
    config = {"tasks": list(chosen), "limit": limit, "precision": precision}
    with ArtifactWriter(out, kind="evaluation", config=config, parents=tuple(parents)) as art:
        material = gather(corpora)
        figures: dict[str, Any] = {}
        for name, task in chosen.items():
            figures |= _measure(name, task, model, material, limit, precision, art.path)
        write_json(art.path / "figures.json", figures)
        art.note(**figures)
    return figures


def _measure(
    name: str, task: Any, model: LoadedModel, material: Material, limit: int, precision: str, folder: Path
) -> dict[str, Any]:
    began = time.perf_counter()
    found = task.run(model, material, limit=limit, precision=precision)
    say(f"{name}: {time.perf_counter() - began:.1f} s")
    rows = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in found.items)
    (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    return found.figures


def gather(corpora: Sequence[Path]) -> Material:
    """The held-out documents of the corpora, plain ones apart from conversations."""
    material = Material()
    for path in corpora:
        for document in read_corpus(path, split="heldout"):
            (material.conversations if document.messages else material.text).append(document)
    return material


def _device(name: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
