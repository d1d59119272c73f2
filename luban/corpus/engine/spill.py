"""Documents between phases: one Arrow stream a part, written and read a few megabytes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.corpus.arrow import COLUMNS, require_pyarrow, schema
from luban.corpus.document import Document
from luban.corpus.writer import as_row, from_row

BATCH_BYTES = 4 << 20  # text bytes of a record batch
ENDING = ".arrow"


class SpillWriter:
    """`with SpillWriter(path) as spill: spill.add(document)`; the columns of a corpus, and the split."""

    def __init__(self, path: Path):
        self.pyarrow, _ = require_pyarrow("building a corpus")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.schema = schema(self.pyarrow).append(self.pyarrow.field("split", self.pyarrow.string()))
        options = self.pyarrow.ipc.IpcWriteOptions(compression="lz4")
        self.file = self.pyarrow.ipc.new_stream(str(path) + ENDING, self.schema, options=options)
        self.rows: list[dict[str, Any]] = []
        self.held = 0

    def __enter__(self) -> SpillWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self.file.close()

    def add(self, document: Document) -> None:
        """Append one document."""
        self.rows.append({**as_row(document), "split": document.split})
        self.held += len(document.text)
        if self.held >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        columns = {name: [row[name] for row in self.rows] for name in (*COLUMNS, "split")}
        self.file.write_batch(self.pyarrow.record_batch(columns, schema=self.schema))
        self.rows, self.held = [], 0


def read_spill(path: Path) -> Iterator[Document]:
    """The documents of a spill, in order."""
    pyarrow, _ = require_pyarrow("building a corpus")
    with pyarrow.OSFile(str(path) + ENDING) as file, pyarrow.ipc.open_stream(file) as stream:
        for batch in stream:
            for row in batch.to_pylist():
                yield from_row(row, row.pop("split"))
