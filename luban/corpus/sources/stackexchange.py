"""Stack Exchange dumps (`Posts.xml`): each question with its answers, best first, without HTML (LLaMA, section 2.1)."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.html import strip
from luban.corpus.sources.xml import elements

QUESTION, ANSWER = "1", "2"  # PostTypeId


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """Questions in the dump's order. Answers wait in a database on disk, so that memory stays bounded.

    Raises:
        DataError: no question in it.
    """
    path, good = Path(name), False
    with tempfile.TemporaryDirectory() as folder:
        answers = sqlite3.connect(Path(folder) / "answers.db")
        answers.execute("CREATE TABLE answers (question TEXT, score INTEGER, number INTEGER, body TEXT)")
        for row in elements(path, ("row",), context):
            if row.get("PostTypeId") == ANSWER and row.get("ParentId"):
                answers.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?)",
                    (row.get("ParentId"), _number(row, "Score"), _number(row, "Id"), row.get("Body") or ""),
                )
        answers.execute("CREATE INDEX by_question ON answers (question, score DESC, number)")
        for row in elements(path, ("row",), context):
            if row.get("PostTypeId") == QUESTION:
                good = True
                yield _document(row, answers, context)
        answers.close()
    if not good:
        raise DataError(f"source {name} holds no question")


def _document(row: Element, answers: sqlite3.Connection, context: SourceContext) -> Document:
    ident = row.get("Id") or ""
    found = answers.execute("SELECT score, body FROM answers WHERE question = ? ORDER BY score DESC, number", (ident,))
    scored = [(score, strip(body)) for score, body in found]
    question = "\n\n".join(part for part in (row.get("Title") or "", strip(row.get("Body") or "")) if part)
    text = "\n\n".join([f"Question: {question}", *(f"Answer: {body}" for _, body in scored if body)])
    meta = {
        "score": _number(row, "Score"),
        "answer_scores": [score for score, _ in scored],
        "tags": row.get("Tags") or "",
        "licence": row.get("ContentLicense") or "CC-BY-SA-4.0",
    }
    return Document(id=f"{context.label}#{ident}", text=text, source=context.label, meta=meta)


def _number(row: Element, name: str) -> int:
    """The attribute's number, 0 where it is none or none that SQLite can hold."""
    try:
        number = int(row.get(name) or 0)
    except ValueError:
        return 0
    return number if abs(number) < 1 << 63 else 0
