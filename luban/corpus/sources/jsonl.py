"""JSON lines, one row a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import PART_BYTES, Part, SourceContext
from luban.corpus.sources.charsets import FileDecoder, byte_order_mark
from luban.corpus.sources.compression import DAMAGED, is_compressed, open_bytes
from luban.corpus.sources.rows import fields_needed, has_text, row_document
from luban.corpus.sources.text import BOMB, LARGEST_UNPACKED, lines
from luban.corpus.tally import Tally

LONGEST_ROW = 64 << 20  # bytes of a line from which it is not read, so that memory stays bounded
CHUNK = 4 << 20  # bytes unpacked at a time to find a compressed file's size
MOST_PACKED = 32  # parts of a compressed file, each of which unpacks the file up to its end
END = 1 << 62  # of the last part
OVERSIZED = "oversized JSON lines"  # as they are counted


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The documents of a JSON-lines file, which may be compressed; lines that are no such object are counted and skipped.

    A document without an id is named by the byte at which its line begins.

    Raises:
        DataError: the file is empty, or no line of it is a document (not where a part of it is read).
    """
    good = number = 0
    too_long = context.tally.unusable[OVERSIZED]
    decoder, fields = FileDecoder(Path(name), context.tally), set()
    for offset, line in _lines(Path(name), context):
        number += 1
        if not line.strip():
            continue
        row = _parse(line, decoder)
        if not isinstance(row, Mapping):
            context.tally.reject("invalid JSON lines", f"{context.label} at byte {offset}")
            continue
        document = row_document(row, offset, f"at byte {offset}", context)
        if document is None:
            fields |= set(row)
            continue
        good += 1
        yield document
    if not good and context.is_whole:
        what = "holds no line with text" if number else "is empty"
        if number and not has_text(fields, context.text_field):
            what = f"holds no line with a field {fields_needed(fields, context.text_field)}"
        if not number and context.tally.unusable[OVERSIZED] > too_long:
            what = f"holds only lines of more than {LONGEST_ROW >> 20} MiB, the most that a row may have"
        raise DataError(f"source {name} {what}")


def parts(name: str, tally: Tally) -> Iterator[Part]:
    """Byte ranges of the file as it is when unpacked; the last is open, so that it meets any damage.

    To find where in a compressed file a part begins, its worker unpacks what comes before: MOST_PACKED bounds that.
    """
    path = Path(name)
    packed = is_compressed(path)
    size = _unpacked(path) if packed else path.stat().st_size
    if size <= PART_BYTES or _recoded(path):
        yield Part()
        return
    step = max(PART_BYTES, -(-size // MOST_PACKED)) if packed else PART_BYTES
    for start in range(0, size, step):
        yield Part(span=(start, start + step if start + step < size else END))


def _unpacked(path: Path) -> int:
    """Bytes of a compressed file when unpacked, up to damage or to where it is a bomb."""
    size, most = 0, max(LARGEST_UNPACKED, BOMB * path.stat().st_size)
    with open_bytes(path) as file:
        try:
            while (data := file.read1(CHUNK)) and size <= most:  # type: ignore[attr-defined]
                size += len(data)
        except DAMAGED:
            pass  # reading the last part finds the damage, and counts it
    return size


def _recoded(path: Path) -> bool:
    """True if the file is UTF-16 or UTF-32, so that its byte offsets differ from those of the decoded text."""
    try:
        with open_bytes(path) as file:
            mark = byte_order_mark(file.read(4))
    except DAMAGED:
        return False
    return mark is not None and mark[1] != "utf-8"


def _lines(path: Path, context: SourceContext) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that begins in the part and is not longer than LONGEST_ROW."""
    start, stop = (context.part and context.part.span) or (0, None)
    begin = offset = max(start - 1, 0)
    skip = bool(start)  # the line that holds the byte before the part belongs to the part before
    held: list[bytes] = []
    for piece in lines(path, context, begin):
        ends = piece.endswith(b"\n")
        if not held and not skip:
            if stop is not None and offset >= stop:
                return
            begin = offset
        offset += len(piece)
        if not skip:
            held.append(piece)
            if offset - begin > LONGEST_ROW:
                context.tally.reject(OVERSIZED, f"{context.label} at byte {begin}")
                held, skip = [], True
            elif ends:
                yield begin, b"".join(held)
                held = []
        if ends:
            skip = False
    if held:
        yield begin, b"".join(held)


def _parse(line: bytes, decoder: FileDecoder) -> Any:
    try:
        return json.loads(decoder.decode(line))
    except (ValueError, RecursionError):
        return None
