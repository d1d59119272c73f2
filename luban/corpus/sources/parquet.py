"""Parquet files, one row a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from luban.core.errors import DataError
from luban.corpus.arrow import require_pyarrow
from luban.corpus.document import Document
from luban.corpus.sources import PART_BYTES, DamagedFile, Part, SourceContext
from luban.corpus.sources.kinds import storable_name
from luban.corpus.sources.rows import FIELDS, TURNS, fields_needed, has_text, row_document
from luban.corpus.tally import Tally


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The rows of a Parquet file as documents; empty rows, unusable ones and damaged row groups are counted and skipped.

    Raises:
        DataError: not Parquet, no such column, or no row with text.
    """
    pyarrow, _ = require_pyarrow("reading Parquet")
    file = _open(name)
    names = file.schema_arrow.names
    if not has_text(names, context.text_field):
        raise DataError(f"source {name} has no column {fields_needed(names, context.text_field)}")
    columns = [column for column in names if column in FIELDS or column == context.text_field]
    start, stop = (context.part and context.part.span) or (0, file.num_row_groups)
    good, first = 0, sum(file.metadata.row_group(group).num_rows for group in range(start))
    for group in range(start, stop):
        number = first
        first += file.metadata.row_group(group).num_rows
        try:
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                for row in _rows(batch, context):
                    document = row_document(row, number, f"in row {number}", context) if row is not None else None
                    number += 1
                    if document is not None:
                        good += 1
                        yield document
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            where = f"{context.label} in row group {group}: {str(error).splitlines()[0]}"
            context.tally.reject("damaged Parquet row groups", where)
    if not good and (start, stop) == (0, file.num_row_groups):
        raise DataError(f"source {name} holds no row with text")


def _open(name: str) -> Any:
    pyarrow, parquet = require_pyarrow("reading Parquet")
    try:
        return parquet.ParquetFile(name if storable_name(name) == name else open(name, "rb"))  # Arrow takes UTF-8 alone
    except PermissionError:
        raise
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DamagedFile(f"source {name} is not a Parquet file: {str(error).splitlines()[0]}") from None


def _rows(batch: Any, context: SourceContext) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch, None for one whose text cannot be read.

    Python cannot hold every value that Arrow can: times of a nanosecond, years from 10000 on, strings that are not UTF-8.
    """
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):
        pass
    for number in range(batch.num_rows):
        row: dict[str, Any] | None = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            try:
                value = column[number].as_py()
            except (ValueError, OverflowError) as error:
                if name == context.text_field or name in TURNS:
                    context.tally.reject("unreadable rows", f"{context.label}: column '{name}': {error}")
                    row = None
                    break
                context.tally.add("unreadable_cells_dropped")
                value = None
            row[name] = value
        yield row


def parts(name: str, tally: Tally) -> Iterator[Part]:
    """Runs of row groups of about PART_BYTES each; a file that cannot be divided is left to `read`."""
    try:
        metadata = _open(name).metadata
    except DataError:
        yield Part()
        return
    start = size = 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= PART_BYTES or group == metadata.num_row_groups - 1:
            yield Part(span=(start, group + 1))
            start, size = group + 1, 0
    if not metadata.num_row_groups:
        yield Part()
