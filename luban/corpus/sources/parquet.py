"""Parquet files with a `text` or `messages` column."""

from __future__ import annotations

from collections.abc import Iterator

from luban.core.errors import DataError
from luban.corpus.arrow import require_pyarrow
from luban.corpus.document import Document
from luban.corpus.sources import PART_BYTES, Part, SourceContext
from luban.corpus.sources.jsonl import row_document
from luban.corpus.tally import Tally

COLUMNS = ("id", "text", "lang", "quality", "messages", "tools", "meta")


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The rows of a Parquet file as documents; rows without text are counted and skipped.

    Raises:
        DataError: not Parquet, no such column, or no row with text.
    """
    pyarrow, parquet = require_pyarrow("reading Parquet")
    try:
        file = parquet.ParquetFile(name)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"source {name} is not a Parquet file: {error}") from None
    columns = [column for column in COLUMNS if column in file.schema_arrow.names]
    if not {"text", "messages"} & set(columns):
        raise DataError(f"source {name} has neither a 'text' nor a 'messages' column")
    start, stop = (context.part and context.part.span) or (0, file.num_row_groups)
    good = 0
    number = sum(file.metadata.row_group(group).num_rows for group in range(start))
    for batch in file.iter_batches(batch_size=256, row_groups=range(start, stop), columns=columns):
        for row in batch.to_pylist():
            document = row_document(row, number, context)
            number += 1
            if document is None:
                context.tally.add("empty_rows_skipped")
                continue
            good += 1
            yield document
    if not good and context.part is None:
        raise DataError(f"source {name} holds no row with text")


def parts(name: str, tally: Tally) -> Iterator[Part]:
    """Runs of row groups of about PART_BYTES each; a file that cannot be divided is left to `read`."""
    pyarrow, parquet = require_pyarrow("reading Parquet")
    try:
        metadata = parquet.ParquetFile(name).metadata
    except pyarrow.ArrowInvalid:
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
