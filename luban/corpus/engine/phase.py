"""The work of one worker: one part of the input through one phase of the steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.artifact import write_json
from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.engine.spill import SpillWriter, read_spill
from luban.corpus.ragged import Ragged
from luban.corpus.sources import DamagedFile, Source
from luban.corpus.steps import make_step
from luban.corpus.steps.across import AcrossStep
from luban.corpus.tally import Tally

Report = Callable[[int], None]  # told how many more documents went through


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps between two decisions."""

    number: int  # 0 reads the sources, others what the phase before left
    apply: str | None  # the step that was decided before this phase
    steps: tuple[str, ...]  # steps that look at one document at a time
    fingerprint: str | None  # the step that is decided after this phase


@dataclass(frozen=True, kw_only=True)
class Task:
    """One part in one phase."""

    phase: Phase
    part: int  # number of the part
    source: Source  # what to read in phase 0
    work: Path  # where spills lie
    seed: int  # of the held-out split
    heldout: float  # fraction held out
    alone: bool = True  # whether there is no other source, so that a damaged one is an error

    def path(self, phase: int) -> Path:
        """Where this part's spill of a phase lies, without its endings."""
        return self.work / f"phase-{phase}" / f"part-{self.part:06d}"

    @property
    def marker(self) -> Path:
        """The file that says that this task is done."""
        return self.path(self.phase.number).with_suffix(".json")

    @property
    def flags(self) -> Path:
        """Where the decision after this phase is put down."""
        return self.path(self.phase.number).with_suffix(".flags")


def phases_of(steps: list[str]) -> list[Phase]:
    """The steps cut behind each AcrossStep; a last phase without a fingerprint only where steps are left for it."""
    phases: list[Phase] = []
    applied: str | None = None
    held: list[str] = []
    for spec in map(str.strip, steps):
        if isinstance(make_step(spec), AcrossStep):
            phases.append(Phase(number=len(phases), apply=applied, steps=tuple(held), fingerprint=spec))
            applied, held = spec, []
        else:
            held.append(spec)
    if held or not phases:
        phases.append(Phase(number=len(phases), apply=applied, steps=tuple(held), fingerprint=None))
    return phases


def run_task(task: Task, report: Report) -> None:
    """Read, step, fingerprint and spill one part; its marker is written last."""
    tally, phase = Tally(), task.phase
    documents: Iterable[Document]
    rows: list[dict[str, Any]] = []
    if phase.number == 0:
        documents = _counted(_read(task, tally), "read", rows)
    else:
        documents = read_spill(task.path(phase.number - 1))
    if phase.apply is not None:
        flags = Ragged.load(task.path(phase.number - 1).with_suffix(".flags"))
        documents = _counted(applied(make_step(phase.apply), documents, flags, tally), phase.apply, rows)
    for spec in phase.steps:
        documents = _counted(make_step(spec)(documents, tally), spec, rows)
    step = make_step(phase.fingerprint) if phase.fingerprint else None
    prints: list[np.ndarray] = []
    with SpillWriter(task.path(phase.number)) as spill:
        for number, document in enumerate(documents):
            spill.add(document)
            if step is not None:
                prints.append(step.fingerprint(document))
            if number % 64 == 63:
                report(64)
    if step is not None:
        Ragged.of(prints, np.uint64).save(task.path(phase.number))
    write_json(task.marker, {"waterfall": rows, "tally": tally.figures()})


def _read(task: Task, tally: Tally) -> Iterator[Document]:
    """The part's documents. Beside other sources, a damaged one without documents is counted as a file of a folder is."""
    try:
        yield from task.source.documents(tally, task.seed, task.heldout)
    except DataError as error:
        damaged = isinstance(error, DamagedFile) or any(what.startswith("damaged") for what in tally.unusable)
        if task.alone or not damaged:
            raise
        tally.reject("files without documents", f"{task.source.label}: {error}")


def applied(step: AcrossStep, documents: Iterable[Document], flags: Ragged, tally: Tally) -> Iterator[Document]:
    """Documents of a part after a step that has decided."""
    for document, flag in zip(documents, flags, strict=True):
        yield from step.apply(document, flag, tally)


def read_marker(task: Task) -> dict[str, Any]:
    """The counts of a finished task."""
    return json.loads(task.marker.read_text(encoding="utf-8"))


def _counted(documents: Iterable[Document], name: str, rows: list[dict[str, Any]]) -> Iterator[Document]:
    """Pass documents on and count in a new row what a step leaves."""
    row = {"step": name, "documents": 0, "bytes": 0}
    rows.append(row)

    def passed() -> Iterator[Document]:
        for document in documents:
            row["documents"] += 1
            row["bytes"] += document.bytes
            yield document

    return passed()
