"""Which parts a build has, and whether they are still those of an interrupted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luban.core.hashing import data_sha256
from luban.corpus.engine.phase import Phase, Task
from luban.corpus.sources import Source, find_sources
from luban.corpus.tally import Tally

FORMAT = 4  # of what parts leave on disk: markers, spills, fingerprints


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The parts of a build, in document order."""

    labels: list[str]  # of the sources
    names: dict[str, str]  # label → what the user wrote
    tasks: list[Task]  # of the first phase, without a folder to work in
    fingerprint: str  # changes with names, sizes and times of the input's files, and with FORMAT


def plan_tasks(
    sources: Sequence[str], phase: Phase, tally: Tally, seed: int, heldout: float, text_field: str = "text"
) -> Plan:
    """Find the sources and divide them. Raises DataError where one does not exist."""
    found = find_sources(list(sources), text_field)
    parts = [part for source in found for part in source.parts(tally)]
    tasks = [
        Task(phase=phase, part=number, source=part, work=Path(), seed=seed, heldout=heldout)
        for number, part in enumerate(parts)
    ]
    return Plan(
        labels=[source.label for source in found],
        names={source.label: source.name for source in found},
        tasks=tasks,
        fingerprint=data_sha256([FORMAT, *([repr(part), _state(part)] for part in parts)]),
    )


def _state(source: Source) -> list[list[int]]:
    """Size and time of every file of a part."""
    root = Path(source.name)
    files = [root / f for f in source.part.files] if source.part and source.part.files is not None else [root]
    states = [file.stat() for file in files if file.is_file()]
    return [[state.st_size, state.st_mtime_ns] for state in states]
