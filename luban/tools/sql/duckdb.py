"""DuckDB: queries on a read-only connection without access to files or networks, changes found by comparing a table with
itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from luban.core.errors import ArtifactError
from luban.tools.sql.database import Answer, Database, Limits, Preview, Row, RowChange, SQLError, TooSlow, ordered
from luban.tools.sql.schema import Column, ForeignKey, Schema, Table, kind_of, quoted

LOCKED_DOWN = {
    "enable_external_access": "false",  # no files, no network, no ATTACH, no COPY, no extensions
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "allow_community_extensions": "false",
    "lock_configuration": "true",  # and none of this can be taken back
}
READS = (duckdb.StatementType.SELECT,)
CHANGES = (duckdb.StatementType.INSERT, duckdb.StatementType.UPDATE, duckdb.StatementType.DELETE)


class DuckDBDatabase(Database):
    """A DuckDB file."""

    dialect = "duckdb"

    def __init__(self, path: Path, limits: Limits):
        self._connection: duckdb.DuckDBPyConnection | None = _connect(path, read_only=True)
        try:
            super().__init__(path, limits)
        except BaseException:
            self.close()
            raise

    @property
    def connection(self) -> duckdb.DuckDBPyConnection:
        """The read-only one; a process may have a file open either to read or to write."""
        if self._connection is None:
            self._connection = _connect(self.path, read_only=True)
        return self._connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def read_schema(self) -> Schema:
        with _errors(self.path):
            rows = self.connection.execute(
                "SELECT c.table_name, t.table_type = 'VIEW', c.column_name, c.data_type, c.is_nullable = 'NO' "
                "FROM information_schema.columns c JOIN information_schema.tables t USING (table_catalog, table_schema, "
                "table_name) WHERE c.table_schema = 'main' AND c.table_catalog = current_database() "
                "ORDER BY c.table_name, c.ordinal_position"
            ).fetchall()
            constraints = self.connection.execute(
                "SELECT table_name, constraint_column_names, referenced_table, referenced_column_names "
                "FROM duckdb_constraints() WHERE constraint_type = 'FOREIGN KEY' AND schema_name = 'main'"
            ).fetchall()
        columns: dict[tuple[str, bool], list[Column]] = {}
        for table, view, name, declared, required in rows:
            column = Column(name=name, type=declared, kind=kind_of(declared), required=required)
            columns.setdefault((table, view), []).append(column)
        tables = tuple(Table(name=name, columns=tuple(found), view=view) for (name, view), found in columns.items())
        keys = tuple(
            ForeignKey(table=table, column=own[0], other=other, other_column=theirs[0])
            for table, own, other, theirs in constraints
            if len(own) == len(theirs) == 1
        )
        return Schema(tables=tables, keys=keys)

    def query(self, sql: str) -> Answer:
        with _errors(self.path), _timed(self.connection, self.limits):
            _require_one(self.connection, sql, READS)
            found = self.connection.sql(sql)  # not run yet: `execute` would make every row of the result
            rows = found.limit(self.limits.rows + 1).fetchall()
        return Answer(
            columns=tuple(found.columns), rows=tuple(rows[: self.limits.rows]), cut=len(rows) > self.limits.rows
        )

    def plan(self, sql: str) -> list[str]:
        with _errors(self.path):
            change = sql.lstrip()[:6].upper() in ("INSERT", "UPDATE", "DELETE")
            if change:  # DuckDB plans changes on a connection that may write alone
                self.require_writable()
                self.close()
            connection = _connect(self.path, read_only=False) if change else self.connection
            try:
                with _timed(connection, self.limits):
                    _require_one(connection, sql, READS + CHANGES)
                    return connection.execute(f"EXPLAIN {sql}").fetchall()[0][1].splitlines()
            finally:
                if change:
                    connection.close()

    def preview(self, sql: str, table: str) -> Preview:
        with self._changing(sql, table) as (_, changes):
            return Preview(sql=sql, changes=changes)

    def apply(self, preview: Preview, table: str) -> None:
        with self._changing(preview.sql, table) as (connection, changes):
            if changes != preview.changes:
                raise self.changed_since()
            connection.execute("COMMIT")

    @contextmanager
    def _changing(self, sql: str, table: str) -> Iterator[tuple[duckdb.DuckDBPyConnection, tuple[RowChange, ...]]]:
        """A transaction in which the statement has run, with the changed rows; rolled back unless it is committed."""
        self.require_writable()
        self.close()
        connection = _connect(self.path, read_only=False)
        try:
            with _errors(self.path), _timed(connection, self.limits):
                _require_one(connection, sql, CHANGES)
                connection.execute("BEGIN")
                connection.execute(f"CREATE TEMP TABLE luban_before AS SELECT * FROM main.{quoted(table)}")
                connection.execute(sql).fetchall()
                yield connection, self._compared(connection, table)
        finally:
            connection.close()  # rolls back

    def _compared(self, connection: duckdb.DuckDBPyConnection, table: str) -> tuple[RowChange, ...]:
        """Rows that went and rows that came. A row that went and one that came are one change where they agree in a
        column that names rows, else two."""
        now, most = f"main.{quoted(table)}", 2 * self.limits.changed_rows + 1
        gone = connection.execute(f"FROM luban_before EXCEPT ALL FROM {now} LIMIT {most}").fetchall()
        come = connection.execute(f"FROM {now} EXCEPT ALL FROM luban_before LIMIT {most}").fetchall()
        changes = _paired(table, gone, come)
        if max(len(gone), len(come), len(changes)) > self.limits.changed_rows:
            raise self.too_many()
        return ordered(changes)


def _paired(table: str, gone: list[Row], come: list[Row]) -> list[RowChange]:
    """Changes of rows, by the first column whose values are the same set, each once, on both sides."""
    width = len((gone or come or [()])[0])
    for at in range(width):
        before, after = {repr(row[at]): row for row in gone}, {repr(row[at]): row for row in come}
        if before.keys() == after.keys() and len(before) == len(gone) == len(come):
            return [RowChange(table=table, before=row, after=after[key]) for key, row in before.items()]
    return [
        *(RowChange(table=table, before=row, after=None) for row in gone),
        *(RowChange(table=table, before=None, after=row) for row in come),
    ]


def _connect(path: Path, *, read_only: bool) -> duckdb.DuckDBPyConnection:
    with _errors(path):
        return duckdb.connect(str(path), read_only=read_only, config=LOCKED_DOWN)  # type: ignore[arg-type]


def _require_one(connection: duckdb.DuckDBPyConnection, sql: str, types: tuple[Any, ...]) -> None:
    """Raise SQLError unless DuckDB's own parser sees one statement of these types."""
    statements = connection.extract_statements(sql)
    try:
        fine = len(statements) == 1 and statements[0].type in types
    except ValueError:  # a type that the package has no name for
        fine = False
    if not fine:
        raise SQLError("the database refuses the statement: it must be one query, or one change of rows")


@contextmanager
def _timed(connection: duckdb.DuckDBPyConnection, limits: Limits) -> Iterator[None]:
    """Stop what runs when its time is over."""
    timer = threading.Timer(limits.seconds, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    """DuckDB's errors as ours."""
    try:
        yield
    except duckdb.InterruptException:
        raise TooSlow("the statement took longer than it may, and was stopped") from None
    except duckdb.Error as error:
        text = str(error).splitlines()[0]
        if "lock" in text and isinstance(error, duckdb.IOException):
            raise ArtifactError(
                f"the database {path} is locked by another program: try again when it is done"
            ) from None
        if isinstance(error, (duckdb.IOException, duckdb.SerializationException, duckdb.FatalException)):
            raise ArtifactError(f"the database {path} can't be opened or is damaged: {text}") from None
        raise SQLError(f"the database refuses the statement: {text}") from None
