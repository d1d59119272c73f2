"""The texts of an evaluation set, from whatever file it lies in: Parquet, JSON, JSON lines, CSV or plain text."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.corpus.arrow import require_pyarrow
from luban.corpus.conversation import strings_of

PARQUET = b"PAR1"
COMPRESSED = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
PACKED = (".gz", ".bz2", ".xz")  # endings of names that say nothing of what is inside


def evaluation_texts(file: Path) -> Iterator[str]:
    """Every string of a Parquet, JSON or CSV file; of plain text the whole and each of its lines.

    The format of a file is detected by its first bytes (Parquet, gzip, bzip2, xz), then by its name (`.json`, `.jsonl`, `.csv`,
    `.tsv`); anything else is plain text.

    Raises:
        DataError: no such file, a file that is damaged or not UTF-8, or a line that is not JSON.
    """
    if not file.is_file():
        raise DataError(
            f"the evaluation set {file} does not exist"
            if not file.exists()
            else f"the evaluation set {file} is a folder: name its files, joined by +"
        )
    data = file.read_bytes()
    if data.startswith(PARQUET):
        yield from _parquet(file)
        return
    text = _text(data, file)
    endings = [ending.lower() for ending in file.suffixes if ending.lower() not in PACKED]
    ending = endings[-1] if endings else ""
    if ending.startswith((".json", ".ndjson")):
        yield from _json(text, file)
    elif ending in (".csv", ".tsv"):
        for row in csv.reader(io.StringIO(text, newline=""), delimiter="\t" if ending == ".tsv" else ","):
            yield from row
    else:
        yield text
        yield from filter(str.strip, text.split("\n"))


def _parquet(file: Path) -> Iterator[str]:
    pyarrow, parquet = require_pyarrow("reading a Parquet evaluation set")
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield from strings_of(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the evaluation set {file} is damaged: {error}") from None


def _text(data: bytes, file: Path) -> str:
    try:
        for head, unpack in COMPRESSED.items():
            data = unpack(data) if data.startswith(head) else data
        if b"\x00" in data:
            raise DataError(f"the evaluation set {file} is neither Parquet, JSON nor UTF-8 text")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"the evaluation set {file} is not UTF-8 (byte {error.start})") from None
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"the evaluation set {file} cannot be unpacked: {error}") from None


def _json(text: str, file: Path) -> Iterator[str]:
    """The strings of one JSON value, or of one a line."""
    try:
        yield from strings_of(json.loads(text))
        return
    except ValueError:
        pass
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield from strings_of(_value(line, number, file))


def _value(line: str, number: int, file: Path) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"the evaluation set {file} holds a line that is not JSON: line {number}: {error}") from None
