"""Pairs of answers to judge, read from files: one of each model, or one whose rows hold two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.core.jsonl import read_rows
from luban.evals.judges.base import SWAPPED, Grade, Judgement, Pair, Single, Verdict

PROMPTS = ("prompt", "instruction", "question", "messages")
ANSWERS = ("answer", "output", "completion", "response", "text")


@dataclass(frozen=True, kw_only=True)
class Match:
    """Two models' answers to one prompt."""

    id: str
    prompt: str
    first: str  # names of models
    second: str
    answers: tuple[str, str]
    reference: str = ""
    human: Verdict | None = None  # which answer a person preferred, where that is known


def tasks_of(*files: Path) -> set[str]:
    """The tasks that rows of evaluations' answers name."""
    return {str(row["task"]) for file in files for _, row in read_rows(file) if "task" in row}


def read_answers(file: Path, *, by_task: bool = False) -> dict[str, dict[str, Any]]:
    """Prompt, answer and reference of each row of a .jsonl file, by id or, where rows have none, by prompt.

    Args:
        by_task: ids are TASK/ITEM, for answers of evaluations of several tasks, whose items are numbered each from 0.

    Rows have `prompt` (or instruction, question, messages) and `answer` (or output, completion, response, text); answers.jsonl of an
    evaluation is such a file. Raises DataError for others; names the line.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, row in read_rows(file):
        prompt, answer = _text(row, PROMPTS), _text(row, ANSWERS)
        if prompt is None or answer is None:
            raise DataError(
                f"{file}:{number}: a row needs a prompt ({', '.join(PROMPTS)}) and an answer ({', '.join(ANSWERS)})"
            )
        key = str(row.get("id", row.get("item", prompt)))
        if by_task and "task" in row:
            key = f"{row['task']}/{key}"
        if key in found:
            raise DataError(f"{file}:{number}: there is an answer to {key[:60]!r} already")
        found[key] = {"prompt": prompt, "answer": answer, "reference": str(row.get("reference") or "")}
    if not found:
        raise DataError(f"{file} holds no answer")
    return found


def _text(row: dict[str, Any], names: Sequence[str]) -> str | None:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, list):  # messages
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
            return None
        return "\n\n".join(message["content"] for message in value)
    return value if isinstance(value, str) else None


def holds_pairs(file: Path) -> bool:
    """Whether the first row of a file holds two answers rather than one. DataError for an empty file."""
    first = next((row for _, row in read_rows(file)), None)
    if first is None:
        raise DataError(f"{file} is empty")
    return "output_1" in first or "chosen" in first


def match_files(files: Sequence[Path], limit: int = 0, humans: Path | None = None) -> list[Match]:
    """Every two files' answers to the prompts that both have, named after the files; the first one's come first.

    Args:
        humans: a .jsonl file of people's preferences: `id` (TASK/ITEM where files hold several tasks) or `prompt`, `preference` (1, 2 or 0 for a tie) over the answers of the
            first two files.

    Raises DataError where two files share no prompt.
    """
    by_task = len(tasks_of(*files)) > 1
    read = {file: read_answers(file, by_task=by_task) for file in files}
    names = _names(files)
    known = _humans(humans) if humans else {}
    found: list[Match] = []
    for (i, a), (j, b) in combinations(enumerate(files), 2):
        shared = [key for key in read[a] if key in read[b]]
        if not shared:
            raise DataError(f"{a} and {b} have no prompt in common")
        for key in shared[: limit or None]:
            one, other = read[a][key], read[b][key]
            if one["prompt"] != other["prompt"]:
                raise DataError(f"{a} and {b} have different prompts under {key[:60]!r}")
            human: Verdict | None = (known.get(key) or known.get(one["prompt"])) if (i, j) == (0, 1) else None
            found.append(
                Match(
                    id=key,
                    prompt=one["prompt"],
                    first=names[i],
                    second=names[j],
                    answers=(one["answer"], other["answer"]),
                    reference=one["reference"] or other["reference"],
                    human=human,
                )
            )
    return found


def _names(files: Sequence[Path]) -> list[str]:
    stems = [file.stem if file.stem != "answers" else file.resolve().parent.name for file in files]
    return stems if len(set(stems)) == len(stems) else [str(file) for file in files]


def _humans(file: Path) -> dict[str, Verdict]:
    found: dict[str, Verdict] = {}
    for number, row in read_rows(file):
        key = row.get("id", row.get("prompt"))
        if key is None:
            raise DataError(f"{file}:{number}: a preference needs an id or a prompt")
        found[str(key)] = preference_of(row.get("preference"), f"{file}:{number}")
    return found


def preference_of(value: Any, where: str) -> Verdict:
    """A preference as AlpacaEval writes it: 1 or 2, a number between nearer to one of them, 1.5 or 0 for a tie."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 2:
        return "tie" if value in (0, 1.5) else "first" if value < 1.5 else "second"
    raise DataError(f"{where}: a preference is 1, 2, or 0 for a tie, {value!r} given")


def read_pairs(file: Path, limit: int = 0) -> list[Match]:
    """The pairs of one .jsonl file as AlpacaEval writes it: `instruction`, `output_1`, `output_2`, optional `generator_1`,
    `generator_2` and `preference`, a person's; or `prompt`, `chosen`, `rejected`, of which a person chose the first.

    Raises DataError for other rows; names the line.
    """
    found: list[Match] = []
    for number, row in read_rows(file):
        if limit and len(found) == limit:
            break
        if isinstance(row.get("chosen"), str) and isinstance(row.get("rejected"), str):
            row = {
                "prompt": _text(row, PROMPTS),
                "output_1": row["chosen"],
                "output_2": row["rejected"],
                "generator_1": "chosen",
                "generator_2": "rejected",
                "preference": 1,
            }
        found.append(match_of(row, str(number), f"{file}:{number}"))
    if not found:
        raise DataError(f"{file} holds no pair")
    return found


def match_of(row: dict[str, Any], name: str, where: str) -> Match:
    """A row as AlpacaEval writes it. Raises DataError for another, with `where` it stands."""
    prompt, first, second = _text(row, PROMPTS), row.get("output_1"), row.get("output_2")
    if prompt is None or not isinstance(first, str) or not isinstance(second, str):
        raise DataError(f"{where}: a row needs instruction, output_1 and output_2, or prompt, chosen and rejected")
    preference = row.get("preference", row.get("preferred"))
    human = None if preference is None else preference_of(preference, where)
    names = [str(row.get(f"generator_{n}", f"output_{n}")) for n in (1, 2)]
    return Match(id=name, prompt=prompt, first=names[0], second=names[1], answers=(first, second), human=human)


class LabelJudge:
    """People's preferences that the pairs came with, as a judge: leaderboards of human labels. DataError where one has none."""

    name = identity = "human"

    def __init__(self, matches: Sequence[Match]):
        self._labels: dict[tuple[str, str, str], Verdict] = {}
        for match in matches:
            if match.human is None:
                raise DataError(f"the pair {match.id} has no preference, which --judge human needs")
            self._labels[match.prompt, *match.answers] = match.human
            self._labels[match.prompt, match.answers[1], match.answers[0]] = SWAPPED[match.human]

    def compare(self, pairs: Sequence[Pair]) -> list[Judgement]:
        """See `Judge`."""
        return [Judgement(verdict=self._labels[pair.prompt, pair.first, pair.second]) for pair in pairs]

    def grade(self, answers: Sequence[Single]) -> list[Grade]:
        """People gave no grades."""
        raise DataError("preferences are no grades: name another judge")
