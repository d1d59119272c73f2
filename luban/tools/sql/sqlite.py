"""SQLite: queries on a connection that can't write and is asked at every step, changes logged by temporary triggers."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from luban.core.errors import ArtifactError
from luban.tools.sql.database import (
    Answer,
    Database,
    Limits,
    Preview,
    RowChange,
    SQLError,
    TooSlow,
    ordered,
)
from luban.tools.sql.functions import ALLOWED
from luban.tools.sql.schema import Column, ForeignKey, Schema, Table, kind_of, quoted

BUSY_SECONDS = 2.0  # that a lock is waited for
STEPS = 10_000  # of SQLite's machine between looks at the clock
MAX_VALUE = 10_000_000  # bytes of one value
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE}
WRITING = {sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
CATALOGUE = ("sqlite_", "pragma_", "luban_")  # tables that statements don't name


class SQLiteDatabase(Database):
    """A SQLite file."""

    dialect = "sqlite"

    def __init__(self, path: Path, limits: Limits):
        self.connection = _connect(path, "ro")
        try:
            super().__init__(path, limits)
        except BaseException:
            self.connection.close()
            raise

    def close(self) -> None:
        self.connection.close()

    def read_schema(self) -> Schema:
        with _errors(self.path):
            named = self.connection.execute(
                "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite\\_%' "
                "ESCAPE '\\' ORDER BY rootpage, name"
            ).fetchall()
            tables = tuple(self._table(name, kind == "view") for name, kind in named)
            keys = [key for table in tables for key in self._keys(table)]
        known = {table.name.lower(): table for table in tables}
        return Schema(tables=tables, keys=tuple(key for key in keys if key.other.lower() in known))

    def definitions(self) -> list[str]:
        """The statements that make the file's tables, views and indexes, without rows."""
        with _errors(self.path):
            rows = self.connection.execute(
                "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND type IN ('table', 'view', 'index') AND name NOT LIKE "
                "'sqlite\\_%' ESCAPE '\\' ORDER BY CASE type WHEN 'table' THEN 0 WHEN 'view' THEN 1 ELSE 2 END"
            )
            return [row[0] for row in rows.fetchall()]

    def _table(self, name: str, view: bool) -> Table:
        rows = self.connection.execute('SELECT name, type, "notnull" FROM pragma_table_info(?)', (name,)).fetchall()
        columns = tuple(Column(name=c, type=t, kind=kind_of(t), required=bool(n)) for c, t, n in rows)
        return Table(name=name, columns=columns, view=view)

    def _keys(self, table: Table) -> list[ForeignKey]:
        """Keys of one column; one that names no column of the other table means its primary key."""
        rows = self.connection.execute(
            'SELECT id, "table", "from", "to" FROM pragma_foreign_key_list(?)', (table.name,)
        ).fetchall()
        single = [row for row in rows if sum(other[0] == row[0] for other in rows) == 1]
        found = []
        for _, other, column, target in single:
            if target is None:
                keys = self.connection.execute("SELECT name FROM pragma_table_info(?) WHERE pk = 1", (other,))
                target = (keys.fetchone() or (None,))[0]
            if target is not None:
                found.append(ForeignKey(table=table.name, column=column, other=other, other_column=target))
        return found

    def query(self, sql: str) -> Answer:
        with _errors(self.path), _guarded(self.connection, self.limits, _may_read):
            cursor = self.connection.execute(sql)
            rows = cursor.fetchmany(self.limits.rows + 1)
            columns = tuple(column[0] for column in cursor.description or ())
            cursor.close()
        return Answer(columns=columns, rows=tuple(rows[: self.limits.rows]), cut=len(rows) > self.limits.rows)

    def plan(self, sql: str) -> list[str]:
        allowed = _may_write if sql.lstrip()[:6].upper() in ("INSERT", "UPDATE", "DELETE") else _may_read
        with _errors(self.path), _guarded(self.connection, self.limits, allowed):
            return [row[3] for row in self.connection.execute(f"EXPLAIN QUERY PLAN {sql}").fetchall()]

    def preview(self, sql: str, table: str) -> Preview:
        with self._changing(sql) as (_, changes):
            return Preview(sql=sql, changes=changes)

    def apply(self, preview: Preview, table: str) -> None:
        with self._changing(preview.sql) as (connection, changes):
            if changes != preview.changes:
                raise self.changed_since()
            connection.execute("COMMIT")

    @contextmanager
    def _changing(self, sql: str) -> Iterator[tuple[sqlite3.Connection, tuple[RowChange, ...]]]:
        """A transaction in which the statement has run, with the changed rows; rolled back unless it is committed."""
        self.require_writable()
        connection = _connect(self.path, "rw")
        try:
            with _errors(self.path):
                connection.execute("PRAGMA foreign_keys = ON")
                connection.execute("BEGIN IMMEDIATE")
                _log_changes(connection, self.schema)
                with _guarded(connection, self.limits, _may_write):
                    connection.execute(sql).fetchall()
                count = connection.execute("SELECT count(*) FROM temp.luban_changes").fetchone()[0]
                if count > self.limits.changed_rows:
                    raise self.too_many()
                yield connection, ordered(_logged(connection, self.schema))
        finally:
            connection.close()  # rolls back


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    with _errors(path):
        uri = f"{path.resolve().as_uri()}?mode={mode}"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=BUSY_SECONDS)
        try:
            if mode == "ro":
                connection.execute("PRAGMA query_only = ON")
            connection.execute("PRAGMA trusted_schema = OFF")  # views and triggers call no function with side effects
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except BaseException:
            connection.close()
            raise
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        return connection


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "interrupted" in text:
            raise TooSlow("the statement took longer than it may, and was stopped") from None
        if "locked" in text or "busy" in text:
            raise ArtifactError(
                f"the database {path} is locked by another program: try again when it is done"
            ) from None
        if "unable to open" in text or "readonly" in text:
            raise ArtifactError(f"the database {path} can't be opened: {text}") from None
        raise SQLError(f"the database refuses the statement: {text}") from None
    except sqlite3.DatabaseError as error:
        text = str(error)
        if "not a database" in text or "malformed" in text or "encrypted" in text:
            raise ArtifactError(f"the database {path} is damaged: {text}") from None
        raise SQLError(f"the database refuses the statement: {text}") from None
    except (sqlite3.Warning, sqlite3.ProgrammingError, sqlite3.DataError, ValueError, OverflowError) as error:
        raise SQLError(f"the database refuses the statement: {error}") from None


Authorizer = Callable[..., int]


def _allowed_function(name: str | None) -> int:
    return sqlite3.SQLITE_OK if name is not None and name.lower() in ALLOWED else sqlite3.SQLITE_DENY


def _may_read(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Reading of tables and functions without side effects; everything else is denied."""
    if action == sqlite3.SQLITE_FUNCTION:
        return _allowed_function(second)
    if action == sqlite3.SQLITE_READ and (first or "").lower().startswith(CATALOGUE):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK if action in READING else sqlite3.SQLITE_DENY


def _may_write(action: int, first: str | None, second: str | None, where: str | None, source: str | None) -> int:
    """The same, and changes of rows of the file's own tables; the log is written by its triggers alone."""
    if action in WRITING and not (first or "").lower().startswith(CATALOGUE):
        return sqlite3.SQLITE_OK
    ours = (source or "").startswith("luban_log_")
    if ours and (action in WRITING or action == sqlite3.SQLITE_READ):
        return sqlite3.SQLITE_OK
    return _may_read(action, first, second)


@contextmanager
def _guarded(connection: sqlite3.Connection, limits: Limits, authorizer: Authorizer) -> Iterator[None]:
    """Statements of people and models: asked about at every step, stopped when their time is over."""
    until = time.monotonic() + limits.seconds
    connection.set_authorizer(authorizer)
    connection.set_progress_handler(lambda: time.monotonic() > until, STEPS)
    try:
        yield
    finally:
        connection.set_authorizer(None)
        connection.set_progress_handler(None, 0)


def _log_changes(connection: sqlite3.Connection, schema: Schema) -> None:
    """Temporary triggers that write every changed row, its values before and after, into `temp.luban_changes`.

    A trigger sees rows that other triggers and cascades change too, but not those that REPLACE deletes: tables declared
    with it are refused, statements with it are by `luban.tools.sql.guard`.
    """
    replacing = connection.execute("SELECT name FROM sqlite_master WHERE sql LIKE '%ON CONFLICT REPLACE%'").fetchone()
    if replacing:
        raise SQLError(f"{replacing[0]} is declared ON CONFLICT REPLACE, whose deletions can't be previewed")
    widest = max(len(table.columns) for table in schema.tables)
    cells = ", ".join(f"{side}{i}" for side in "bc" for i in range(widest))
    connection.execute(f"CREATE TEMP TABLE luban_changes (place INTEGER, kind TEXT, {cells})")
    for place, table in enumerate(schema.tables):
        if table.view:
            continue
        width = len(table.columns)
        for kind, sides in (("INSERT", ("", "NEW")), ("UPDATE", ("OLD", "NEW")), ("DELETE", ("OLD", ""))):
            values = [
                f"{side}.{quoted(table.columns[i].name)}" if side and i < width else "NULL"
                for side in sides
                for i in range(widest)
            ]
            connection.execute(
                f"CREATE TEMP TRIGGER luban_log_{place}_{kind} AFTER {kind} ON main.{quoted(table.name)} BEGIN "
                f"INSERT INTO luban_changes VALUES ({place}, '{kind}', {', '.join(values)}); END"
            )


def _logged(connection: sqlite3.Connection, schema: Schema) -> Iterator[RowChange]:
    """What the triggers wrote; an update to the same values is no change."""
    for place, kind, *cells in connection.execute("SELECT * FROM temp.luban_changes"):
        table, half = schema.tables[place], len(cells) // 2
        width = len(table.columns)
        before = tuple(cells[:width]) if kind != "INSERT" else None
        after = tuple(cells[half : half + width]) if kind != "DELETE" else None
        if before != after:
            yield RowChange(table=table.name, before=before, after=after)
