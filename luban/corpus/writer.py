"""Documents → Parquet files with the same bytes every time."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.corpus.arrow import COLUMNS, require_pyarrow, schema
from luban.corpus.document import Document
from luban.corpus.jsonable import jsonable

GROUP_BYTES = 8 << 20  # text bytes a row group
FILE_BYTES = 512 << 20  # text bytes a file


class SplitWriter:
    """Writes `SPLIT-00000.parquet`, `SPLIT-00001.parquet`, … in the order of `add`."""

    def __init__(self, folder: Path, split: str, file_bytes: int = FILE_BYTES):
        self.folder, self.split, self.file_bytes = folder, split, file_bytes
        self.pyarrow, self.parquet = require_pyarrow("writing a corpus")
        self.rows: list[dict[str, Any]] = []
        self.held = self.written = self.files = 0
        self.documents = self.bytes = 0
        self._file: Any = None

    def add(self, document: Document) -> None:
        """Append one document."""
        size = document.bytes
        self.rows.append(as_row(document))
        self.held += size
        self.documents += 1
        self.bytes += size
        if self.held >= GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self.rows:
            return
        if self._file is None:
            name = f"{self.split}-{self.files:05d}.parquet"
            self._file = self.parquet.ParquetWriter(self.folder / name, schema(self.pyarrow), compression="zstd")
            self.files += 1
        columns = {name: [row[name] for row in self.rows] for name in COLUMNS}
        table = self.pyarrow.table(columns, schema=schema(self.pyarrow))
        self._file.write_table(table, row_group_size=max(len(self.rows), 1))
        self.written += self.held
        self.rows, self.held = [], 0
        if self.written >= self.file_bytes:
            self._end_file()

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self.written = None, 0

    def close(self) -> None:
        """Write what is held and end the file."""
        self._flush()
        self._end_file()


class SortedWriter:
    """Writes a split in id order in bounded memory: sorted runs on disk, then one merge."""

    def __init__(self, folder: Path, split: str, run_bytes: int = 256 << 20):
        self.folder, self.split, self.run_bytes = folder, split, run_bytes
        self.runs: list[Path] = []
        self.held: list[Document] = []
        self.size = self.documents = self.bytes = 0

    def add(self, document: Document) -> None:
        """Take one document."""
        self.held.append(document)
        self.size += document.bytes
        if self.size >= self.run_bytes:
            self._spill()

    def _spill(self) -> None:
        path = self.folder / f"run-{self.split}-{len(self.runs):05d}.jsonl"
        with open(path, "w", encoding="utf-8") as file:
            for document in sorted(self.held, key=_by_id):
                file.write(json.dumps(as_row(document)) + "\n")
        self.runs.append(path)
        self.held, self.size = [], 0

    def close(self) -> None:
        """Merge the runs into the split's files."""
        writer = SplitWriter(self.folder, self.split)
        runs = [_read_run(path) for path in self.runs]
        for document in heapq.merge(*runs, sorted(self.held, key=_by_id), key=_by_id):
            writer.add(document)
        writer.close()
        self.documents, self.bytes = writer.documents, writer.bytes
        for path in self.runs:
            path.unlink()


def _by_id(document: Document) -> str:
    return document.id


def _read_run(path: Path) -> Iterator[Document]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield from_row(json.loads(line))


def as_row(document: Document) -> dict[str, Any]:
    """A document as a row of COLUMNS."""
    return {
        "id": document.id,
        "text": document.text,
        "source": document.source,
        "lang": document.lang,
        "quality": document.quality,
        "messages": _json(document.messages),
        "meta": _json(document.meta),
    }


def from_row(row: dict[str, Any], split: str | None = None) -> Document:
    """A row of COLUMNS as a document."""
    decoded = {name: None if row[name] is None else json.loads(row[name]) for name in ("messages", "meta")}
    return Document(**{**row, **decoded}, split=split)


def _json(value: Any) -> str | None:
    if value is None:
        return None
    try:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except ValueError:  # a step noted NaN or infinity
        return json.dumps(jsonable(value), ensure_ascii=False, sort_keys=True)
