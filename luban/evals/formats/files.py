"""Files of the public formats, read as they are published."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError


def text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, gzipped or not. Raises DataError where it is missing or something else."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, a file is needed") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile):
        raise DataError(f"{path} is no UTF-8 text") from None
    return text.split("\n")


def json_file(path: Path) -> Any:
    """What a JSON file holds. Raises DataError where it isn't JSON."""
    try:
        return json.loads("\n".join(text_lines(path)))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None


def json_lines(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line. Raises DataError for a line that isn't one, or lacks a field."""
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}") from None
        require(row, fields, f"{path}:{number}")
        yield number, row


def require(row: Any, fields: tuple[str, ...], where: str) -> None:
    """Raise DataError unless `row` is a table with all fields."""
    missing = [name for name in fields if not isinstance(row, dict) or row.get(name) is None]
    if missing:
        raise DataError(f"{where} has no {', '.join(missing)}")
