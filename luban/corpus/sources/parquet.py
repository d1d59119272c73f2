"""Parquet files with a `text` or `messages` column."""

from __future__ import annotations

from collections.abc import Iterator

from luban.core.errors import DataError
from luban.corpus.arrow import require_pyarrow
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.jsonl import row_document

COLUMNS = ("id", "text", "lang", "quality", "messages", "meta")


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
    good = number = 0
    for batch in file.iter_batches(batch_size=1024, columns=columns):
        for row in batch.to_pylist():
            document = row_document(row, number, context)
            number += 1
            if document is None:
                context.tally.add("empty_rows_skipped")
                continue
            good += 1
            yield document
    if not good:
        raise DataError(f"source {name} holds no row with text")
