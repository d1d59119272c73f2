"""JSON lines: objects with `text`, or `messages` (and `tools`) for conversations; `id`, `lang`, `quality`, `meta` are kept."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.corpus.document import Document, check_messages, conversation_text
from luban.corpus.sources import PART_BYTES, Part, SourceContext
from luban.corpus.sources.text import BOMB, DAMAGED, LARGEST_UNPACKED, LONGEST_LINE, decode, lines
from luban.corpus.tally import Tally

CHUNK = 4 << 20  # bytes unpacked at a time to find a compressed file's size
MOST_PACKED = 32  # parts of a compressed file, each of which unpacks the file up to its end
END = 1 << 62  # of the last part


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The documents of a `.jsonl` or `.jsonl.gz` file; lines that are no such object are counted and skipped.

    A document without an id is named by the byte at which its line begins.

    Raises:
        DataError: the file is empty, or no line of it is a document (not where a part of it is read).
    """
    good = number = 0
    for offset, line in _lines(Path(name), context):
        number += 1
        if not line.strip():
            continue
        row = _parse(line, context)
        document = row_document(row, offset, context)
        if document is None:
            what = "JSON lines without 'text' or 'messages'" if isinstance(row, Mapping) else "invalid JSON lines"
            context.tally.spoilt(what, f"{context.label} at byte {offset}")
            continue
        good += 1
        yield document
    if not good and context.part is None:
        what = "is empty" if not number else "holds no line with a 'text' or 'messages' field"
        raise DataError(f"source {name} {what}")


def parts(name: str, tally: Tally) -> Iterator[Part]:
    """Byte ranges of the file as it is when unpacked; the last is open, so that it meets any damage.

    To find where in a compressed file a part begins, its worker unpacks what comes before: MOST_PACKED bounds that.
    """
    packed = name.endswith(".gz")
    size = _unpacked(Path(name)) if packed else Path(name).stat().st_size
    if size <= PART_BYTES:
        yield Part()
        return
    step = max(PART_BYTES, -(-size // MOST_PACKED)) if packed else PART_BYTES
    for start in range(0, size, step):
        yield Part(span=(start, start + step if start + step < size else END))


def _unpacked(path: Path) -> int:
    """Bytes of a compressed file when unpacked, up to damage or to where it is a bomb."""
    size, most = 0, max(LARGEST_UNPACKED, BOMB * path.stat().st_size)
    with gzip.open(path, "rb") as file:
        try:
            while (data := file.read1(CHUNK)) and size <= most:
                size += len(data)
        except DAMAGED:
            pass  # reading the last part finds the damage, and counts it
    return size


def _lines(path: Path, context: SourceContext) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins in the part and is not longer than LONGEST_LINE."""
    start, stop = (context.part and context.part.span) or (0, None)
    offset = begin = max(start - 1, 0)
    skip = bool(start)  # the line that holds the byte before the part belongs to the part before
    oversized = False
    for piece in lines(path, context, begin):
        ends = piece.endswith(b"\n")
        if not skip and not oversized:
            if stop is not None and offset >= stop:
                return
            if ends or len(piece) < LONGEST_LINE:
                yield offset, piece
            else:
                oversized = True
                context.tally.spoilt("oversized JSON lines", f"{context.label} at byte {offset}")
        elif ends:
            skip = oversized = False
        offset += len(piece)


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
    if not isinstance(text, str) or not (text.strip() or _calls(messages)):
        return None
    own, quality, lang = row.get("id"), row.get("quality"), row.get("lang")
    return Document(
        id=f"{context.label}#{own if isinstance(own, (str, int)) else f'{number:09d}'}",
        text=_encodable(text),
        source=context.label,
        lang=lang if isinstance(lang, str) else None,
        quality=float(quality) if isinstance(quality, (int, float)) else None,
        messages=messages and _encodable_messages(messages),
        meta=_meta(row),
    )


def _encodable(text: str) -> str:
    r"""JSON may spell lone surrogates (`\ud800`), which no UTF-8 file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _calls(messages: list[dict[str, Any]] | None) -> bool:
    return any(message.get("tool_calls") for message in messages or ())


def _encodable_messages(messages: list[dict[str, Any]]) -> Any:
    """The same for every string of a conversation."""
    return json.loads(_encodable(json.dumps(messages, ensure_ascii=False)))


def _meta(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The row's `meta`, and where it came from if it says so."""
    value = row.get("meta")
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    named: dict[str, Any] = {key: row[key] for key in ("url", "licence") if isinstance(row.get(key), str)}
    if tools := _tools(row.get("tools")):
        named["tools"] = tools
    return {**(value if isinstance(value, dict) else {}), **named} or None


def _tools(value: Any) -> list[Any] | None:
    """The row's list of tools, which may be JSON text."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, list) and all(isinstance(tool, dict) for tool in value) else None
