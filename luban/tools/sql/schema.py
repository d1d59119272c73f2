"""What a database holds, as data: tables, columns with the kind of their values, foreign keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from luban.core.errors import DataError

Kind = Literal["number", "text", "date", "boolean", "other"]
KINDS: tuple[tuple[str, Kind], ...] = (  # the first whose pattern is found in a declared type
    (r"BOOL", "boolean"),
    (r"DATE|TIME", "date"),
    (r"\[\]|STRUCT|MAP|LIST|BLOB|BYTEA|JSON|UUID|INTERVAL|BIT", "other"),
    (r"CHAR|TEXT|CLOB|STRING|ENUM", "text"),
    (r"INT|REAL|FLOA|DOUB|NUM|DEC|SERIAL", "number"),
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    name: str
    type: str  # as declared
    kind: Kind  # of its values
    required: bool = False  # whether it can't be null

    @property
    def whole(self) -> bool:
        """Whether its numbers are whole."""
        return self.kind == "number" and re.search(r"INT|SERIAL", self.type.upper()) is not None


@dataclass(frozen=True, kw_only=True)
class ForeignKey:
    """`table.column` holds values of `other.other_column`."""

    table: str
    column: str
    other: str
    other_column: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table or a view."""

    name: str
    columns: tuple[Column, ...]
    view: bool = False

    def column(self, name: str) -> Column:
        """By name in any case. Raises DataError for an unknown one."""
        for column in self.columns:
            if column.name.lower() == name.lower():
                return column
        raise DataError(f"the table {self.name} has no column {name}")


@dataclass(frozen=True, kw_only=True)
class Schema:
    """The tables of a database."""

    tables: tuple[Table, ...]
    keys: tuple[ForeignKey, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Table]:
        """Tables by their names in lower case."""
        return {table.name.lower(): table for table in self.tables}

    def only(self, names: Sequence[str]) -> Schema:
        """The same with these tables alone, in their order here."""
        kept = {name.lower() for name in names}
        tables = tuple(table for table in self.tables if table.name.lower() in kept)
        keys = tuple(key for key in self.keys if {key.table.lower(), key.other.lower()} <= kept)
        return replace(self, tables=tables, keys=keys)


def kind_of(declared: str) -> Kind:
    """The kind of values of a declared type; SQLite's columns without a type hold anything."""
    for pattern, kind in KINDS:
        if re.search(pattern, declared.upper()):
            return kind
    return "other"


# Words that neither database takes as a bare name everywhere, of SQLite's and PostgreSQL's lists.
RESERVED_WORDS = (
    "abort action add after all alter always analyze and any array as asc attach autoincrement before begin between "
    "both by cascade case cast check collate column commit conflict constraint create cross current current_date "
    "current_time current_timestamp database default deferrable deferred delete desc detach distinct do drop each "
    "else end escape except exclude exclusive exists explain fail false filter first following for foreign from full "
    "generated glob group groups having if ignore immediate in index indexed initially inner insert instead intersect "
    "into is isnull join key lambda last lateral leading left like limit match materialized natural no not nothing "
    "notnull null nulls of offset on only or order others outer over partition pivot placing plan pragma preceding "
    "primary qualify query raise range recursive references regexp reindex release rename replace restrict returning "
    "right rollback row rows savepoint select set similar some summarize symmetric table temp temporary then ties to "
    "trailing transaction trigger true unbounded union unique unpivot update user using vacuum values variadic view "
    "virtual when where window with without "
)
RESERVED = frozenset(RESERVED_WORDS.split())


def quoted(name: str) -> str:
    """A name as SQL, in quotes where it needs them."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.lower() not in RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'
