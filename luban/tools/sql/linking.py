"""Schema linking: which tables, columns and values of a database a question speaks of, found by retrieval."""

from __future__ import annotations

import re
from dataclasses import dataclass

from luban.core.bm25 import BM25, words
from luban.tools.sql.database import Database, SQLError
from luban.tools.sql.schema import Column, Schema, Table, quoted

DISTINCT = 1000  # values of a column that are compared with the question
NAMED = 2.0  # added to a table's score where the question has its whole name, and for each of its values
LONGEST = 60  # characters of such a value


@dataclass(frozen=True, kw_only=True)
class Value:
    """A value of a column that the question names."""

    table: str
    column: str
    text: str  # as the database spells it


@dataclass(frozen=True, kw_only=True)
class Linked:
    """What of a database a question is about."""

    schema: Schema  # the tables that may be used, the likeliest first
    values: tuple[Value, ...]


class Linker:
    """Ranks a database's tables for questions by BM25 over names of tables and columns, and over values.

    Args:
        tables: that are kept for a question, beside those that join them.
    """

    def __init__(self, database: Database, *, tables: int = 6):
        self.schema, self.most = database.schema, tables
        self.values = _values(database)
        self.texts = BM25([_text(table) for table in self.schema.tables])

    def link(self, question: str) -> Linked:
        """The tables and values that a question speaks of. All tables, ranked, where the database has few."""
        values = self._named_values(question)
        asked = words(question)
        scores = self.texts.scores(asked)
        for place, table in enumerate(self.schema.tables):
            if set(words(table.name)) <= set(asked):
                scores[place] += NAMED
        for value in values:
            scores[self._place(value.table)] += NAMED
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
        names = [self.schema.tables[place].name for place in order[: self.most]]
        kept = self._with_bridges(names)
        tables = tuple(self.schema.by_name[name.lower()] for name in kept)
        keys = self.schema.only(kept).keys
        shown = {name.lower() for name in kept}
        return Linked(
            schema=Schema(tables=tables, keys=keys), values=tuple(v for v in values if v.table.lower() in shown)
        )

    def _place(self, table: str) -> int:
        return next(i for i, other in enumerate(self.schema.tables) if other.name == table)

    def _with_bridges(self, names: list[str]) -> list[str]:
        """These tables, and those that have keys of two of them."""
        kept = [name.lower() for name in names]
        for table in self.schema.tables:
            near = {key.other.lower() for key in self.schema.keys if key.table.lower() == table.name.lower()}
            if table.name.lower() not in kept and len(near & set(kept)) >= 2:
                names = [*names, table.name]
        return names

    def _named_values(self, question: str) -> list[Value]:
        """Values that stand in the question as whole words, in any case; the longest first where one holds another."""
        asked = question.casefold()
        found: list[tuple[int, Value]] = []
        for folded, value in self.values:
            if folded in asked and re.search(rf"(?<!\w){re.escape(folded)}(?!\w)", asked):
                found.append((len(folded), value))
        found.sort(key=lambda pair: (-pair[0], pair[1].table, pair[1].column))
        kept: list[Value] = []
        for _, value in found:
            inside = any(
                value.text.casefold() in other.text.casefold() and value.text.casefold() != other.text.casefold()
                for other in kept
            )
            if not inside:
                kept.append(value)
        return kept[:8]


def _text(table: Table) -> list[str]:
    """What a table is known by: its name, which counts twice, and its columns' names."""
    return [*words(table.name), *words(table.name), *(word for column in table.columns for word in words(column.name))]


def _values(database: Database) -> list[tuple[str, Value]]:
    """(folded text, value) of the columns with text, a bounded number a column."""
    found = []
    for table in database.schema.tables:
        for column in table.columns:
            if column.kind != "text":
                continue
            for text in _distinct(database, table, column):
                if isinstance(text, str) and 1 < len(text) <= LONGEST:
                    found.append((text.casefold(), Value(table=table.name, column=column.name, text=text)))
    return found


def _distinct(database: Database, table: Table, column: Column) -> list[str]:
    """Some values of a column; none where the database refuses, as views may."""
    try:
        sql = f"SELECT DISTINCT {quoted(column.name)} FROM {quoted(table.name)} LIMIT {DISTINCT}"
        return [row[0] for row in database.query(sql).rows]
    except SQLError:
        return []
