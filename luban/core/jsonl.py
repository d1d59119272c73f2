"""Files of one JSON object a line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from luban.core.artifact import atomic_write
from luban.core.errors import DataError

T = TypeVar("T")


def read_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a .jsonl file, or a .jsonl.gz, that isn't blank.

    Raises:
        DataError: no such file, one that isn't UTF-8 or is damaged, or a line that isn't a JSON object; names the line.
    """
    if not file.is_file():
        raise DataError(f"{file} is not a file: a .jsonl file is needed")
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as lines:
            yield from _objects(file, lines)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} cannot be unpacked: {error}") from None


def _objects(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{file}:{number} is not UTF-8: {error.reason}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{file}:{number} is not a JSON object")
        yield number, row


def parsed_rows(file: Path, parse: Callable[[dict[str, Any]], T], what: str) -> list[T]:
    """`parse(row)` of every row.

    Args:
        parse: raises ValueError or DataError for a row that can't be used.
        what: a row is, for the error of a file without any.

    Raises:
        DataError: as `read_rows`, for a row that `parse` refuses (names the line), and for a file without rows.
    """
    found = []
    for number, row in read_rows(file):
        try:
            found.append(parse(row))
        except (ValueError, DataError) as error:
            raise DataError(f"{file}:{number}: {error}") from None
    if not found:
        raise DataError(f"{file} has no {what}")
    return found


def write_rows(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one object a line, atomically."""
    atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
