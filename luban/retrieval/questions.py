"""Files of questions: SQuAD's format (Rajpurkar et al. 2016) and DPR's (Karpukhin et al. 2020)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luban.core.errors import DataError, problem
from luban.corpus.document import Document

HEAD = 4096  # bytes in which a question file shows what it is


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its right answers."""

    text: str
    answers: tuple[str, ...]  # any of them is right; empty: none is in the collection
    source: str = ""  # id of the document that answers it, where the file says so
    spans: tuple[tuple[int, int], ...] = ()  # characters of that document that the answers are
    positives: tuple[tuple[str, str], ...] = ()  # (title, text) of passages that answer it
    negatives: tuple[tuple[str, str], ...] = ()  # (title, text) of passages that look alike and don't


def is_question_file(path: Path) -> bool:
    """Whether a file is JSON in SQuAD's format, whose paragraphs can be indexed."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with open(path, "rb") as file:
        return b'"paragraphs"' in file.read(HEAD)


def paragraphs(path: Path) -> Iterator[Document]:
    """The paragraphs of a file in SQuAD's format as documents, with their article's title.

    Raises DataError where the file isn't one.
    """
    for identifier, title, paragraph in _paragraphs(path, _read(path)):
        if paragraph["context"].strip():
            meta = {"title": title} if title else None
            yield Document(id=identifier, text=paragraph["context"], source=path.name, meta=meta)


def read_questions(path: str | Path) -> list[Question]:
    """The questions of a file: SQuAD's format, DPR's (a list of `question`, `answers`, `positive_ctxs`, …), or JSON lines
    of DPR's objects.

    Raises:
        DataError: no such file, another format, or a question without text; names the place.
    """
    path = Path(path)
    data = _read(path)
    try:
        found = list(_squad(path, data) if isinstance(data, dict) else _dpr(data))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} isn't in SQuAD's or DPR's format: {problem(error)}") from None
    if not found:
        raise DataError(f"{path} holds no questions")
    return found


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} is not a file: questions in SQuAD's or DPR's format are needed")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".jsonl", ".ndjson"):
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def _paragraphs(path: Path, data: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(id, title, paragraph) of SQuAD's articles."""
    try:
        for article in data["data"]:
            title = str(article.get("title") or "").replace("_", " ")
            for number, paragraph in enumerate(article["paragraphs"]):
                yield f"{path.name}/{title}#{number}", title, paragraph
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} isn't in SQuAD's format: {problem(error)}") from None


def _squad(path: Path, data: dict[str, Any]) -> Iterator[Question]:
    for identifier, title, paragraph in _paragraphs(path, data):
        for asked in paragraph["qas"]:
            answers = [answer for answer in asked["answers"] if answer["text"]]
            yield Question(
                text=asked["question"],
                answers=tuple(dict.fromkeys(answer["text"] for answer in answers)),
                source=identifier,
                spans=tuple(dict.fromkeys((a["answer_start"], a["answer_start"] + len(a["text"])) for a in answers)),
                positives=((title, paragraph["context"]),),
            )


def _dpr(rows: list[Any]) -> Iterator[Question]:
    for row in rows:
        passages = {
            name: tuple((str(p.get("title") or ""), p["text"]) for p in row.get(name) or ())
            for name in ("positive_ctxs", "hard_negative_ctxs")
        }
        yield Question(
            text=row["question"],
            answers=tuple(row["answers"]),
            positives=passages["positive_ctxs"],
            negatives=passages["hard_negative_ctxs"],
        )
