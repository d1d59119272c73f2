"""JSON lines: objects with `text`, or `messages` for conversations; `id`, `lang`, `quality`, `meta` are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.corpus.document import Document, check_messages, conversation_text
from luban.corpus.sources import SourceContext
from luban.corpus.sources.text import LONGEST_LINE, decode, lines


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The documents of a `.jsonl` or `.jsonl.gz` file; lines that are no such object are counted and skipped.

    Raises:
        DataError: the file is empty, or no line of it is a document.
    """
    good = number = 0
    cut = False  # inside a line longer than LONGEST_LINE
    for line in lines(Path(name)):
        whole = line.endswith(b"\n") or len(line) < LONGEST_LINE
        skip, cut = cut or not whole, not whole
        number += whole
        if skip:
            if whole:
                context.tally.add("oversized_json_lines_skipped")
            continue
        if not line.strip():
            continue
        document = row_document(_parse(line, context), number - 1, context)
        if document is None:
            context.tally.add("invalid_json_lines_skipped")
            continue
        good += 1
        yield document
    if not good:
        what = "is empty" if not number else "holds no line with a 'text' or 'messages' field"
        raise DataError(f"source {name} {what}")


def _parse(line: bytes, context: SourceContext) -> Any:
    try:
        return json.loads(decode(line, context))
    except (ValueError, RecursionError):
        return None


def row_document(row: Any, number: int, context: SourceContext) -> Document | None:
    """A table row as a document, or None where it is none."""
    if not isinstance(row, Mapping):
        return None
    try:
        messages = check_messages(row["messages"]) if row.get("messages") else None
    except ValueError:
        return None
    text = row.get("text")
    if messages is not None:
        text = conversation_text(messages)
    if not isinstance(text, str) or not text.strip():
        return None
    own, quality, lang = row.get("id"), row.get("quality"), row.get("lang")
    return Document(
        id=f"{context.label}#{own if isinstance(own, (str, int)) else f'{number:09d}'}",
        text=_encodable(text),
        source=context.label,
        lang=lang if isinstance(lang, str) else None,
        quality=float(quality) if isinstance(quality, (int, float)) else None,
        messages=messages and [{**m, "content": _encodable(m["content"])} for m in messages],
        meta=_meta(row.get("meta")),
    )


def _encodable(text: str) -> str:
    r"""JSON may spell lone surrogates (`\ud800`), which no UTF-8 file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _meta(value: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
