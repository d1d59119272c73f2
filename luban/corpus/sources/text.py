"""Text files. Prose longer than 256 KiB is divided at blank lines, so that one book is not one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.charsets import FileDecoder, open_text
from luban.corpus.sources.compression import DAMAGED, is_compressed, plain_name

PROSE = (".txt", ".md", ".rst", ".text")  # what may be divided; code stays whole
WHOLE = 256 * 1024  # bytes up to which prose stays one document
LARGEST = 16 << 20  # bytes up to which any other text stays one document, so that memory stays bounded
PIECE = 16 * 1024  # bytes after which a piece of longer prose ends at the next blank line
LONGEST_LINE = 1 << 20  # bytes of a line read at a time, and after which a line of prose is divided
WORD = 4096  # characters at the end of a divided line in which a place between two words is looked for
ENDS = ".!?。！？…"  # where a line without white space is divided
# a compressed file that unpacks to over 400 times its size and over 256 MiB is refused as a decompression bomb
BOMB, LARGEST_UNPACKED = 400, 256 << 20
PROBE = 8192  # bytes in which a zero byte means the file is binary


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The documents of one text file, which may be compressed.

    Raises:
        DataError: the file is empty, binary, or damaged from its beginning.
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
    prose, size = plain_name(path).endswith(PROSE), path.stat().st_size
    divided = size > LARGEST or (prose and (size > WHOLE or is_compressed(path)))
    for number, text in enumerate(_texts(path, divided, context)):
        yield Document(id=f"{name}#{number:06d}" if divided or number else name, text=text, source=context.label)


def looks_binary(path: Path) -> bool:
    """True if there is a zero byte near the beginning."""
    try:
        with open_text(path) as file:
            return b"\0" in file.read(PROBE)
    except DAMAGED:
        return False  # reading it finds the damage, and counts it


def lines(path: Path, context: SourceContext, start: int = 0) -> Iterator[bytes]:
    """Lines with their ends from byte `start` on, longer ones in pieces of LONGEST_LINE bytes.

    Where a compressed file is damaged, the lines before the damage come and the damage is counted.
    """
    compressed = is_compressed(path)
    with open_text(path) as file:
        read = start
        if start and file.seekable():
            file.seek(start)
        while start and not file.seekable():  # Arrow's streams cannot seek
            start -= len(file.read(min(start, LONGEST_LINE))) or start
        while True:
            try:
                line = file.readline(LONGEST_LINE)
            except DAMAGED as error:
                context.tally.reject("damaged compressed files", f"{context.label} at byte {read}: {error}")
                return
            if not line:
                return
            read += len(line)
            if compressed and read > LARGEST_UNPACKED and read > BOMB * path.stat().st_size:
                context.tally.reject("suspicious compressed files", f"{context.label}: more than {BOMB} times its size")
                return
            yield line


def decoded(path: Path, context: SourceContext) -> Iterator[str]:
    """The file's lines as text, longer ones in pieces."""
    decoder = FileDecoder(path, context.tally)
    for line in lines(path, context):
        yield decoder.decode(line, final=False)
    yield decoder.decode(b"")


def whole(path: Path, context: SourceContext) -> bytes:
    """A file's bytes up to LARGEST, of a damaged one those before the damage."""
    held, size = [], 0
    for line in lines(path, context):
        held.append(line)
        size += len(line)
        if size >= LARGEST:
            break
    return b"".join(held)


def whole_text(path: Path, context: SourceContext) -> str:
    """The text of `whole`."""
    return FileDecoder(path, context.tally).decode(whole(path, context))


def _texts(path: Path, divided: bool, context: SourceContext) -> Iterator[str]:
    """The file's text in pieces that end with a line, or between two words of a line of LONGEST_LINE bytes."""
    decoder, rest = FileDecoder(path, context.tally), ""
    for piece, last in _pieces(path, divided, context):
        text = rest + decoder.decode(piece, final=last)
        end = len(text) if last or text.endswith("\n") else _between_words(text)
        text, rest = text[:end], text[end:]
        if text.strip():
            yield text


def _between_words(text: str) -> int:
    """The last place near the end of a text that is behind white space or a sentence, or its end."""
    for place in range(len(text), max(len(text) - WORD, 0), -1):
        if text[place - 1].isspace() or text[place - 1] in ENDS:
            return place
    return len(text)


def _pieces(path: Path, divided: bool, context: SourceContext) -> Iterator[tuple[bytes, bool]]:
    """(bytes, whether they are the file's last)."""
    held: list[bytes] = []
    size = 0
    for line in lines(path, context):
        held.append(line)
        size += len(line)
        ends = not line.strip() or size >= LONGEST_LINE
        if (divided and size >= PIECE and ends) or size >= LARGEST:
            yield b"".join(held), False
            held, size = [], 0
    yield b"".join(held), True
