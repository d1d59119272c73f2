"""Questions with answers: TriviaQA, SQuAD and its kin, CoQA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.evals.formats.files import json_file, require

NOT_ANSWERABLE = "unanswerable"  # what stands for the answer to a SQuAD 2 question that has none


def _data(path: Path, name: str) -> list[Any]:
    found = json_file(path)
    rows = found.get(name) if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path} has no list '{name}'")
    return rows


def triviaqa(path: Path) -> Iterator[dict[str, Any]]:
    """TriviaQA (Joshi et al. 2017), the authors' JSON: `question`, `answers` (the value and its aliases)."""
    for number, row in enumerate(_data(path, "Data"), 1):
        require(row, ("Question", "Answer"), f"{path}, question {number}")
        answer = row["Answer"]
        require(answer, ("Value",), f"{path}, answer {number}")
        answers = dict.fromkeys([answer["Value"], *answer.get("Aliases", ())])
        yield {"id": row.get("QuestionId", str(number)), "question": row["Question"], "answers": list(answers)}


def squad(path: Path) -> Iterator[dict[str, Any]]:
    """SQuAD 1.1 and 2 (Rajpurkar et al. 2016, 2018), XQuAD, MLQA: `title`, `context`, `question`, `answers`, `answerable`."""
    for document in _data(path, "data"):
        require(document, ("paragraphs",), f"{path}, document")
        for paragraph in document["paragraphs"]:
            require(paragraph, ("context", "qas"), f"{path}, paragraph")
            for asked in paragraph["qas"]:
                require(asked, ("id", "question"), f"{path}, question")
                answers = list(dict.fromkeys(each["text"] for each in asked.get("answers") or ()))
                yield {
                    "id": str(asked["id"]),
                    "title": document.get("title", ""),
                    "context": paragraph["context"],
                    "question": asked["question"],
                    "answers": answers or [NOT_ANSWERABLE],
                    "answerable": bool(answers),
                }


def coqa(path: Path) -> Iterator[dict[str, Any]]:
    """CoQA (Reddy et al. 2019): a row a turn, with `story`, the `history` of questions and answers before it, `question`,
    `answers` (those of further annotators among them)."""
    for document in _data(path, "data"):
        require(document, ("id", "story", "questions", "answers"), f"{path}, story")
        asked, given = document["questions"], document["answers"]
        if len(asked) != len(given):
            raise DataError(f"{path}, story {document['id']}: {len(asked)} questions and {len(given)} answers")
        further = list((document.get("additional_answers") or {}).values())
        history: list[dict[str, str]] = []
        for turn, (question, answer) in enumerate(zip(asked, given, strict=True)):
            texts = [answer["input_text"], *(other[turn]["input_text"] for other in further)]
            yield {
                "id": f"{document['id']}:{turn + 1}",
                "story": document["story"],
                "history": list(history),
                "question": question["input_text"],
                "answers": list(dict.fromkeys(texts)),
            }
            history.append({"question": question["input_text"], "answer": answer["input_text"]})
