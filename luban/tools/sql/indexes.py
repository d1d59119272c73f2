"""Indexes that a query would use, found by making them in an empty copy of the schema and asking for its plan there."""

from __future__ import annotations

import re
import sqlite3
from dataclasses import dataclass

from sqlglot import exp

from luban.tools.sql.database import Database
from luban.tools.sql.guard import Statement
from luban.tools.sql.schema import Schema, Table, quoted

COMPARED = (exp.EQ, exp.GT, exp.LT, exp.GTE, exp.LTE, exp.Between, exp.In)
MOST = 3  # suggestions


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """An index that the planner takes."""

    sql: str  # CREATE INDEX …
    table: str
    before: str  # the plan's step without it
    after: str  # and with it


def suggest_indexes(statement: Statement, database: Database) -> list[Suggestion]:
    """Indexes of one or two columns for tables that SQLite's plan scans, each proved by the plan that it changes.

    Nothing is made in the database itself. DuckDB scans columns and skips blocks by their extremes: it gets none.
    """
    if database.dialect != "sqlite":
        return []
    scanned = {found[1].lower() for step in database.plan(statement.sql) if (found := _scan(step))}
    with sqlite3.connect(":memory:") as copy:
        try:
            _copy_schema(database, copy)
            before = _plan(copy, statement.sql)
            found = []
            for table, columns in _candidates(statement.tree, database.schema):
                names = {table.name.lower(), *_aliases(statement.tree, table)}
                if not names & scanned or len(found) == MOST:
                    continue
                if suggestion := _tried(copy, statement.sql, before, table, columns):
                    found.append(suggestion)
                    before = _plan(copy, statement.sql)
            return found
        except sqlite3.Error:  # a schema that a bare copy can't hold, such as virtual tables
            return []


def _scan(step: str) -> re.Match[str] | None:
    return re.match(r"SCAN (\w+)(?! USING (?:COVERING )?INDEX)", step)


def _plan(connection: sqlite3.Connection, sql: str) -> list[str]:
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]


def _copy_schema(database: Database, copy: sqlite3.Connection) -> None:
    """The tables and indexes without rows, from what the schema says: the catalogue isn't open to queries."""
    from luban.tools.sql.sqlite import SQLiteDatabase

    assert isinstance(database, SQLiteDatabase)
    for sql in database.definitions():
        copy.execute(sql)


def _tried(
    copy: sqlite3.Connection, sql: str, before: list[str], table: Table, columns: list[str]
) -> Suggestion | None:
    """The index, where the plan uses it; it is kept in the copy then."""
    name = f"idx_{'_'.join(re.sub(r'[^0-9A-Za-z]+', '_', part) for part in (table.name, *columns))}"
    statement = f"CREATE INDEX {name} ON {quoted(table.name)} ({', '.join(map(quoted, columns))})"
    copy.execute(statement)
    used = next((step for step in _plan(copy, sql) if re.search(rf"INDEX {name}\b", step)), None)
    if used is None:
        copy.execute(f"DROP INDEX {name}")
        return None
    replaced = [step for step in before if step not in _plan(copy, sql)]
    return Suggestion(sql=statement, table=table.name, before=replaced[0] if replaced else before[0], after=used)


def _candidates(tree: exp.Expression, schema: Schema) -> list[tuple[Table, list[str]]]:
    """(table, columns) of comparisons: equalities first, two of them together with what they share."""
    found: list[tuple[bool, Table, str]] = []
    for node in tree.find_all(*COMPARED):
        sides = [node.this, node.args.get("expression")]
        for side in sides:
            if isinstance(side, exp.Column) and (owner := _owner(side, tree, schema)):
                found.append((not isinstance(node, (exp.EQ, exp.In)), owner, owner.column(side.name).name))
    found.sort(key=lambda candidate: candidate[0])
    pairs: dict[str, list[str]] = {}
    for _, table, column in found:
        columns = pairs.setdefault(table.name, [])
        if column not in columns:
            columns.append(column)
    both = [(schema.by_name[name.lower()], columns[:2]) for name, columns in pairs.items()]
    single = [(schema.by_name[name.lower()], [column]) for name, columns in pairs.items() for column in columns]
    return both + [candidate for candidate in single if candidate not in both]


def _aliases(tree: exp.Expression, table: Table) -> set[str]:
    """Names under which a statement uses a table."""
    nodes = (node for node in tree.find_all(exp.Table) if node.name.lower() == table.name.lower())
    return {node.alias_or_name.lower() for node in nodes}


def _owner(column: exp.Column, tree: exp.Expression, schema: Schema) -> Table | None:
    """The table that a column belongs to; None where that isn't clear."""
    used = [node for node in tree.find_all(exp.Table) if node.name.lower() in schema.by_name]
    if column.table:
        used = [node for node in used if node.alias_or_name.lower() == column.table.lower()]
    tables = {node.name.lower(): schema.by_name[node.name.lower()] for node in used}
    owners = [table for table in tables.values() if any(c.name.lower() == column.name.lower() for c in table.columns)]
    return owners[0] if len(owners) == 1 and not owners[0].view else None
