"""Single answers graded by a judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luban.core.artifact import ArtifactWriter, write_json
from luban.core.errors import DataError, UnfinishedError
from luban.core.hashing import data_sha256
from luban.core.jsonl import write_rows
from luban.core.metrics.bootstrap import interval
from luban.evals.judges.base import Judge, Single
from luban.evals.judges.pairs import read_answers, tasks_of
from luban.evals.judges.pairwise import kept_answers


def run_grades(judge: Judge, file: Path, out: Path, limit: int = 0) -> dict[str, dict[str, Any]]:
    """Grade the answers of a file and write results.json and judgements.jsonl; returns the figures.

    Raises:
        DataError: no grade could be read. UnfinishedError: the judge left answers without one; the same command asks again.
    """
    rows = list(read_answers(file, by_task=len(tasks_of(file)) > 1).items())[: limit or None]
    config = {"judge": judge.identity, "answers": data_sha256(rows)}
    settings = {"judge": judge.name}
    with (
        ArtifactWriter(out, kind="judgement", config=config, settings=settings, resumable=True) as art,
        kept_answers(judge, art.path / "responses.jsonl"),
    ):
        asked = [Single(prompt=row["prompt"], answer=row["answer"], reference=row["reference"]) for _, row in rows]
        grades = judge.grade(asked)
        lines = [
            {"id": key, **row, "grade": each.grade, "text": each.text, "failed": each.failed}
            for (key, row), each in zip(rows, grades, strict=True)
        ]
        write_rows(art.path / "judgements.jsonl", lines)
        known = [each.grade for each in grades if each.grade is not None]
        failed = [each.failed for each in grades if each.failed]
        found: dict[str, dict[str, Any]] = {
            "unparsed": {"value": len(grades) - len(known) - len(failed), "interval": None, "n": len(grades)},
            "failed": {"value": len(failed), "interval": None, "n": len(grades)},
        }
        if known:
            mean = sum(known) / len(known)
            found = {"grade": {"value": mean, "interval": list(interval(known)), "n": len(known)}, **found}
        write_json(art.path / "results.json", found)
        art.note(**{name: entry["value"] for name, entry in found.items()})
        if failed:
            raise UnfinishedError(
                f"{len(failed)} of {len(grades)} answers have no grade ({failed[0]}): the same command asks again"
            )
        if not known:
            raise DataError(f"none of {len(grades)} grades of {judge.name} could be read: give another --template")
    return found
