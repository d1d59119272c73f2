"""Text files. Prose longer than 256 KiB is divided at blank lines, so that one book is not one document."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext

PROSE = (".txt", ".md", ".rst", ".text")  # what may be divided; code stays whole
WHOLE = 256 * 1024  # bytes up to which prose stays one document
LARGEST = 16 << 20  # bytes up to which any other text stays one document, so that memory stays bounded
PIECE = 16 * 1024  # bytes after which a piece of longer prose ends at the next blank line
LONGEST_LINE = 1 << 20  # bytes after which a line is cut, so that memory stays bounded
BOMB, LARGEST_UNPACKED = 400, 256 << 20  # a gzip file that grows more than so often, past so many bytes, is a bomb
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
PROBE = 8192  # bytes in which a zero byte means the file is binary


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The documents of one text file (`.gz` is unpacked).

    Raises:
        DataError: the file is empty, binary, or a damaged gzip file.
    """
    path = Path(name)
    if looks_binary(path):
        raise DataError(f"source {name} is binary, not text")
    found = False
    for document in read_file(path, context.label, context):
        found = True
        yield document
    if not found:
        raise DataError(f"source {name} is empty")


def read_file(path: Path, name: str, context: SourceContext) -> Iterator[Document]:
    """The documents of a file already known to be text; their ids begin with `name`."""
    prose, size = path.name.removesuffix(".gz").endswith(PROSE), path.stat().st_size
    divided = size > LARGEST or (prose and (size > WHOLE or path.name.endswith(".gz")))
    number = 0
    for piece in _pieces(path, divided, context):
        text = decode(piece, context)
        if text.strip():
            ident = f"{name}#{number:06d}" if divided or number else name
            yield Document(id=ident, text=text, source=context.label)
            number += 1


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, unpacked when it ends in `.gz`."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb")  # type: ignore[return-value]


def looks_binary(path: Path) -> bool:
    """Whether a zero byte stands near the beginning."""
    try:
        with open_bytes(path) as file:
            return b"\0" in file.read(PROBE)
    except DAMAGED:
        return False  # reading it finds the damage, and counts it


def decode(data: bytes, context: SourceContext) -> str:
    """UTF-8 text, line ends as `\\n`; bytes that are not UTF-8 become U+FFFD and are counted."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        context.tally.add("invalid_utf8_replaced", text.count("\ufffd") - data.count("\ufffd".encode()))
    return text.replace("\r\n", "\n")


def lines(path: Path, context: SourceContext, start: int = 0) -> Iterator[bytes]:
    """Lines with their ends from byte `start` on, longer ones cut at LONGEST_LINE.

    Where a compressed file is damaged, the lines before the damage come and the damage is counted.
    """
    with open_bytes(path) as file:
        file.seek(start)
        read = start
        while True:
            try:
                line = file.readline(LONGEST_LINE)
            except DAMAGED as error:
                context.tally.spoilt("damaged gzip files", f"{context.label} at byte {read}: {error}")
                return
            if not line:
                return
            read += len(line)
            if path.name.endswith(".gz") and read > LARGEST_UNPACKED and read > BOMB * path.stat().st_size:
                context.tally.spoilt("suspicious gzip files", f"{context.label}: more than {BOMB} times its size")
                return
            yield line


def whole(path: Path, context: SourceContext) -> bytes:
    """A file's bytes up to LARGEST, of a damaged one those before the damage."""
    held, size = [], 0
    for line in lines(path, context):
        held.append(line)
        size += len(line)
        if size >= LARGEST:
            break
    return b"".join(held)


def _pieces(path: Path, divided: bool, context: SourceContext) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for line in lines(path, context):
        held.append(line)
        size += len(line)
        ends = not line.strip() or size >= LONGEST_LINE
        if (divided and size >= PIECE and ends) or size >= LARGEST:
            yield b"".join(held)
            held, size = [], 0
    yield b"".join(held)
