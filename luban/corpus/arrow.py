"""The Parquet layout of a corpus, and pyarrow when it is there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from luban.core.errors import MissingExtra

COLUMNS = ("id", "text", "source", "lang", "quality", "messages", "meta")


def require_pyarrow(needed_for: str) -> tuple[ModuleType, ModuleType]:
    """(pyarrow, pyarrow.parquet), imported now. Raises MissingExtra with the pip command."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "corpus", needed_for) from None
    return pyarrow, pyarrow.parquet


def schema(pyarrow: ModuleType) -> Any:
    """The columns of a corpus file; `messages` and `meta` are JSON text."""
    types = {name: pyarrow.string() for name in COLUMNS} | {"quality": pyarrow.float64()}
    return pyarrow.schema([pyarrow.field(name, types[name]) for name in COLUMNS])
