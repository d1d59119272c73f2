"""A database file, opened so that nothing can be changed: what SQLite and DuckDB have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from luban.core.errors import ArtifactError, DataError, MissingExtra
from luban.tools.sql.schema import Schema

SQLITE, DUCKDB = b"SQLite format 3\0", b"DUCK"  # at byte 0, at byte 8
Row = tuple[Any, ...]


class SQLError(DataError):
    """A statement that the database refuses."""


class TooSlow(SQLError):
    """A statement that took longer than it may."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one statement may cost."""

    seconds: float = 30.0
    rows: int = 1000  # that are read of a result
    changed_rows: int = 10_000  # that a change may affect


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Rows of a query."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    cut: bool  # whether there are more


@dataclass(frozen=True, kw_only=True)
class RowChange:
    """A row before and after a change; None: it isn't there."""

    table: str
    before: Row | None
    after: Row | None


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Every row that a statement changes, also through triggers and cascades."""

    sql: str
    changes: tuple[RowChange, ...]  # in an order that depends on the rows alone

    def tables(self) -> dict[str, int]:
        """Rows that change, by table."""
        counts: dict[str, int] = {}
        for change in self.changes:
            counts[change.table] = counts.get(change.table, 0) + 1
        return counts


class Database(ABC):
    """A database file. Queries run on a connection that can't write; a change has one of its own.

    Raises of every method:
        SQLError: the database refuses the statement.
        TooSlow: it takes longer than `limits.seconds`.
        ArtifactError: the file is locked or damaged.
    """

    dialect: ClassVar[str]  # as sqlglot names it

    def __init__(self, path: Path, limits: Limits):
        self.path, self.limits = path, limits
        self.schema: Schema = self.read_schema()

    @abstractmethod
    def read_schema(self) -> Schema:
        """Tables, columns and foreign keys."""

    @abstractmethod
    def query(self, sql: str) -> Answer:
        """Rows of one statement that reads."""

    @abstractmethod
    def plan(self, sql: str) -> list[str]:
        """How the statement would be run, a line a step; nothing is run."""

    @abstractmethod
    def preview(self, sql: str, table: str) -> Preview:
        """What a statement that changes `table` would change; nothing is."""

    @abstractmethod
    def apply(self, preview: Preview, table: str) -> None:
        """Make the changes of a preview. Raises SQLError, and changes nothing, where they would be others by now."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def require_writable(self) -> None:
        """Raise ArtifactError where the file can't be written."""
        try:
            with self.path.open("r+b"):
                pass
        except OSError as error:
            raise ArtifactError(f"{self.path} can't be changed: {error.strerror}") from None

    def too_many(self) -> SQLError:
        """The error for a change that is larger than allowed."""
        return SQLError(f"the change affects more than {self.limits.changed_rows} rows: nothing was changed")

    def changed_since(self) -> SQLError:
        """The error for a preview that doesn't hold any more."""
        return SQLError(
            "the database, or what the statement does, is not as in the preview any more: nothing was changed"
        )


def open_database(path: str | Path, limits: Limits = Limits()) -> Database:
    """Open a SQLite or DuckDB file, known by its first bytes.

    Raises:
        ArtifactError: there is no such file, it is neither, it is locked or damaged, or it holds no table.
        MissingExtra: DuckDB, or sqlglot, isn't installed.
    """
    path = Path(path)
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder: a database is a file of SQLite or DuckDB")
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise ArtifactError(f"there is no database {path}") from None
    except OSError as error:
        raise ArtifactError(f"the database {path} can't be read: {error.strerror}") from None
    if head.startswith(SQLITE) or not head:  # an empty file is an empty database to SQLite
        from luban.tools.sql.sqlite import SQLiteDatabase

        database: Database = SQLiteDatabase(path, limits)
    elif head[8:12] == DUCKDB:
        try:
            from luban.tools.sql.duckdb import DuckDBDatabase
        except ImportError:
            raise MissingExtra("duckdb", "sql", f"reading {path}") from None
        database = DuckDBDatabase(path, limits)
    else:
        raise ArtifactError(f"{path} is not a database: it is neither a SQLite nor a DuckDB file")
    if not database.schema.tables:
        database.close()
        raise ArtifactError(f"the database {path} holds no table")
    return database


def ordered(changes: Iterable[RowChange]) -> tuple[RowChange, ...]:
    """Changes in an order that depends on the rows alone."""
    return tuple(sorted(changes, key=lambda change: (change.table, repr(change.before), repr(change.after))))
