"""Tables of comma- or tab-separated values whose first line names the columns, one document a row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import NoTextField, SourceContext
from luban.corpus.sources.jsonl import LONGEST_ROW
from luban.corpus.sources.rows import fields_needed, has_text, row_document
from luban.corpus.sources.text import decoded

DELIMITERS = ",;\t|"  # the one that divides the first line most often divides all


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The rows of a table as documents; rows of another length than the first line's are counted and skipped.

    Raises:
        NoTextField: no column with text.
        DataError: no row with text.
    """
    csv.field_size_limit(LONGEST_ROW)  # the module's limit of 128 KiB is one for the whole process
    texts = _lines(decoded(Path(name), context))
    head = next(texts, "")
    delimiter = max(DELIMITERS, key=head.count)
    try:
        columns = [column.strip() for column in next(csv.reader([head], delimiter=delimiter), [])]
    except csv.Error as error:
        raise DataError(f"source {name} is no CSV file: {error} in its first line") from None
    if not has_text(columns, context.text_field):
        raise NoTextField(f"source {name} has no column {fields_needed(columns, context.text_field)}")
    good, number, rows = 0, 0, csv.reader(texts, delimiter=delimiter)
    while True:
        number += 1
        try:
            cells = next(rows, None)
        except csv.Error as error:
            context.tally.reject("invalid CSV rows", f"{context.label} in row {number}: {error}")
            continue
        if cells is None:
            break
        if not cells:
            continue
        if len(cells) != len(columns):
            where = f"{context.label} in row {number}: {len(cells)} cells for {len(columns)} columns"
            context.tally.reject("invalid CSV rows", where)
            continue
        row = {column: cell for column, cell in zip(columns, cells, strict=True) if cell}
        document = row_document({context.text_field: None, **row}, number, f"in row {number}", context)
        if document is not None:
            good += 1
            yield document
    if not good:
        raise DataError(f"source {name} holds no row with text")


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    """Whole lines, since csv.reader takes every text it is given for one; no longer ones than LONGEST_ROW.

    A carriage return alone ends a line, too, as in files of spreadsheets on old Macintoshes.
    """
    held, size = [], 0
    for piece in pieces:
        for part in io.StringIO(piece.replace("\r", "\n"), newline="\n"):
            held.append(part)
            size += len(part)
            if part.endswith("\n") or size > LONGEST_ROW:
                yield "".join(held)
                held, size = [], 0
    yield "".join(held)
