"""Rows, previews and statements as text for a terminal, and as JSON."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

from luban.tools.sql.database import Answer, Preview, Row
from luban.tools.sql.schema import Schema

WIDEST = 48  # characters of a cell
SHOWN = 20  # changed rows


def cell(value: Any) -> str:
    """A value in one line."""
    text = "NULL" if value is None else f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
    text = " ".join(text.split()) if text.strip() else text
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def table(answer: Answer) -> str:
    """Rows under their columns' names, numbers to the right."""
    cells = [[cell(value) for value in row] for row in answer.rows]
    widths = [max(map(len, column)) for column in zip(answer.columns, *cells, strict=True)]
    right = [
        bool(answer.rows) and all(v is None or isinstance(v, (int, float)) for v in values)
        for values in zip(*answer.rows, strict=True)
    ] or [False] * len(widths)

    def line(row: Sequence[str]) -> str:
        parts = (text.rjust(w) if r else text.ljust(w) for text, w, r in zip(row, widths, right, strict=True))
        return "  ".join(parts).rstrip()

    lines = [line(answer.columns), line(["-" * width for width in widths]), *map(line, cells)]
    more = [f"… more than {len(answer.rows)} rows"] if answer.cut else []
    return "\n".join(lines + more)


def preview(changes: Preview, schema: Schema) -> str:
    """Counts by table, then rows as they are and as they would be."""
    if not changes.changes:
        return "no row would change"
    lines = [f"{name}: {count} {'row' if count == 1 else 'rows'}" for name, count in changes.tables().items()]
    for change in changes.changes[:SHOWN]:
        names = [column.name for column in schema.by_name[change.table.lower()].columns]
        for sign, row in (("-", change.before), ("+", change.after)):
            if row is not None:
                lines.append(f"{sign} {change.table}: {_named(names, row)}")
    hidden = len(changes.changes) - SHOWN
    return "\n".join(lines + ([f"… and {hidden} more"] if hidden > 0 else []))


def _named(names: Sequence[str], row: Row) -> str:
    return ", ".join(f"{name} {cell(value)}" for name, value in zip(names, row, strict=True))


def jsonable(value: Any) -> Any:
    """A value as JSON has it: bytes in base 64, what JSON hasn't as text."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def rows(found: Sequence[Row]) -> list[list[Any]]:
    """Rows as JSON has them."""
    return [[jsonable(value) for value in row] for row in found]
