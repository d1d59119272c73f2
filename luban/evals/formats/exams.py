"""Knowledge, school mathematics and code: MMLU, GSM8K, HumanEval."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.core.metrics.numbers import last_number
from luban.evals.formats.files import json_lines, text_lines

COLUMNS = 6  # question, four choices, letter


def mmlu(path: Path) -> Iterator[dict[str, Any]]:
    """MMLU (Hendrycks et al. 2021): a .csv file of a subject, or the folder of them: `subject` (of the file's name), `question`,
    `choices`, `answer` (a letter)."""
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .csv file")
    for file in files:
        subject = file.stem
        for split in ("_test", "_val", "_dev"):
            subject = subject.removesuffix(split)
        for number, cells in enumerate(csv.reader(text_lines(file)), 1):
            if not cells:
                continue
            if len(cells) != COLUMNS or cells[-1].strip() not in ("A", "B", "C", "D"):
                raise DataError(f"{file}, row {number}: question, four choices and a letter A to D are needed")
            yield {
                "subject": subject.replace("_", " "),
                "question": cells[0].strip(),
                "choices": [cell.strip() for cell in cells[1:5]],
                "answer": cells[5].strip(),
            }


def gsm8k(path: Path) -> Iterator[dict[str, Any]]:
    """GSM8K (Cobbe et al. 2021): `question`, the worked `answer`, its `number`."""
    for number, row in json_lines(path, ("question", "answer")):
        found = last_number(row["answer"]) if "####" in row["answer"] else None
        if found is None:
            raise DataError(f"{path}:{number}: the answer has no number behind ####")
        yield {"question": row["question"], "answer": row["answer"], "number": f"{found:f}"}


def humaneval(path: Path) -> Iterator[dict[str, Any]]:
    """HumanEval (Chen et al. 2021): `task_id`, `prompt`, `tests` (which call the function), `solution`."""
    for _, row in json_lines(path, ("task_id", "prompt", "test", "entry_point")):
        yield {
            "id": row["task_id"],
            "prompt": row["prompt"],
            "entry_point": row["entry_point"],
            "tests": f"{row['test']}\n\ncheck({row['entry_point']})\n",
            "solution": row.get("canonical_solution", ""),
        }
