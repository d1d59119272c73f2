"""JSON files that hold one array of rows, read an element at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import NoTextField, SourceContext
from luban.corpus.sources.jsonl import LONGEST_ROW
from luban.corpus.sources.rows import fields_needed, has_text, row_document
from luban.corpus.sources.text import decoded
from luban.corpus.tally import Tally

CHUNK = 1 << 20  # characters parsed at a time, at the least
NUMBER = "0123456789.eE+-"  # what numbers are made of
BLANK = re.compile(r"[ \t\r\n]*")


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The elements of the array as documents; damage ends the reading, and is counted.

    Raises:
        NoTextField: no element has a field with text.
        DataError: no array of objects, or no element is a document.
    """
    good = number = 0
    fields: set[str] = set()
    own = replace(context, tally=Tally())  # what a table of something else holds is not counted
    try:
        for number, row in enumerate(elements(decoded(Path(name), context)), 1):
            if not good and isinstance(row, dict):
                fields |= set(row)
            document = row_document(row, number, f"in element {number}", own)
            if document is not None:
                good += 1
                yield document
    except (ValueError, RecursionError) as error:
        own.tally.reject("damaged JSON arrays", f"{context.label} after element {number}: {error}")
    if fields and not has_text(fields, context.text_field):
        raise NoTextField(f"source {name} holds no element with a field {fields_needed(fields, context.text_field)}")
    context.tally.merge(own.tally.figures())
    if not good:
        raise DataError(f"source {name} holds no array of objects with text")


def elements(pieces: Iterator[str]) -> Iterator[Any]:
    """The elements of one JSON array whose text comes in pieces.

    Raises:
        ValueError: no array, invalid JSON, or an element of more than LONGEST_ROW characters.
    """
    text = _Text(pieces)
    if text.next_sign() != "[":
        raise ValueError("no array")
    text.place += 1
    first = True
    while (sign := text.next_sign()) != "]":
        if not first:
            if sign != ",":
                raise ValueError("neither a comma nor the array's end follows an element")
            text.place += 1
        yield text.value()
        first = False


class _Text:
    """The part of a JSON text that is being parsed."""

    def __init__(self, pieces: Iterator[str]):
        self.pieces = pieces
        self.held, self.place, self.ended = "", 0, False

    def more(self) -> None:
        """Hold at least as many characters more as are left, and drop those that are parsed."""
        left = self.held[self.place :]
        wanted, read = max(CHUNK, len(left)), [left]
        while wanted > 0 and not self.ended:
            piece = next(self.pieces, None)
            self.ended = piece is None
            read.append(piece or "")
            wanted -= len(piece or "")
        self.held, self.place = "".join(read), 0

    def next_sign(self) -> str:
        """The next character that is no white space. Raises ValueError at the end."""
        while True:
            self.place = BLANK.match(self.held, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.held):
                return self.held[self.place]
            if self.ended:
                raise ValueError("the array does not end")
            self.more()

    def value(self) -> Any:
        """The value that begins here."""
        self.next_sign()
        while True:
            try:
                value, end = DECODER.raw_decode(self.held, self.place)
                if end < len(self.held) and self.held[end] not in NUMBER:  # else a number may go on
                    self.place = end
                    return value
            except ValueError:
                if self.ended:
                    raise
            if self.ended:
                raise ValueError("the array does not end")
            if len(self.held) - self.place > LONGEST_ROW:
                raise ValueError(f"an element of more than {LONGEST_ROW} characters, or invalid JSON")
            self.more()


DECODER = json.JSONDecoder()
