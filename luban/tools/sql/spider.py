"""Questions in Spider's layout (Yu et al. 2018), and execution accuracy: does a statement give the rows of the right one?

A folder holds `dev.json` (or another name), a list of {"db_id", "question", "query"}, and `database/ID/ID.sqlite`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from pathlib import Path
from typing import Any

from luban.core.errors import DataError, LubanError, problem
from luban.serve.engine import Engine
from luban.tools.sql.ask import SQLWriter
from luban.tools.sql.database import Answer, Database, Limits, open_database
from luban.tools.sql.guard import check

MAX_ORDERS = 5040  # orders of columns that are tried


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question with its right query."""

    question: str
    sql: str
    database: Path


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What became of an example."""

    example: Example
    sql: str  # the model's; "" where it wrote none
    right: bool
    problem: str  # why there were no rows to compare; "" where there were


def read_spider(path: Path) -> list[Example]:
    """The examples of a file in Spider's layout, or of a folder's `dev.json`.

    Raises:
        DataError: no such file, one of another form, or a database that isn't there.
    """
    file = path / "dev.json" if path.is_dir() else path
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        found = [(row["db_id"], row["question"], row["query"]) for row in rows]
    except OSError as error:
        raise DataError(f"{file} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is not a list of questions in Spider's form: {problem(error)}") from None
    examples = []
    for name, question, sql in found:
        places = [file.parent / "database" / name / f"{name}{suffix}" for suffix in (".sqlite", ".duckdb")]
        database = next((place for place in places if place.is_file()), None)
        if database is None:
            raise DataError(f"{file} asks about the database {name}, and there is no {places[0]}")
        examples.append(Example(question=question, sql=sql, database=database))
    return examples


def same_rows(found: Answer, right: Answer, *, ordered: bool) -> bool:
    """Whether two results hold the same rows, whatever the order of columns, and of rows unless `ordered`.

    Numbers are compared to six decimals, so that sums don't depend on the order of rows.
    """
    if len(found.rows) != len(right.rows) or len(found.columns) != len(right.columns) or found.cut != right.cut:
        return False
    ours, theirs = [_plain(row) for row in found.rows], [_plain(row) for row in right.rows]
    if ordered:
        return any(
            [tuple(row[i] for i in order) for row in ours] == theirs
            for order in _orders(ours, theirs, len(found.columns))
        )
    wanted = Counter(theirs)
    return any(
        Counter(tuple(row[i] for i in order) for row in ours) == wanted
        for order in _orders(ours, theirs, len(found.columns))
    )


def _plain(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(round(float(v), 6) if isinstance(v, (int, float)) and not isinstance(v, bool) else v for v in row)


def _orders(ours: list[tuple], theirs: list[tuple], width: int) -> Iterator[tuple[int, ...]]:
    """Orders of our columns in which each column has the values of theirs."""
    mine = [Counter(row[i] for row in ours) for i in range(width)]
    wanted = [Counter(row[i] for row in theirs) for i in range(width)]
    for order in islice(permutations(range(width)), MAX_ORDERS):
        if all(mine[i] == wanted[place] for place, i in enumerate(order)):
            yield order


def evaluate(
    engine: Engine, examples: Sequence[Example], *, constrained: bool = True, seconds: float = 10.0
) -> Iterator[Scored]:
    """Each example with the model's statement and whether its rows are right."""
    limits = Limits(seconds=seconds, rows=10_000)
    by_database: dict[Path, list[Example]] = {}
    for example in examples:
        by_database.setdefault(example.database, []).append(example)
    for path, asked in by_database.items():
        with open_database(path, limits) as database:
            writer = SQLWriter(engine, database, constrained=constrained)
            for example in asked:
                yield _scored(writer, database, example)


def _scored(writer: SQLWriter, database: Database, example: Example) -> Scored:
    right = database.query(example.sql)  # what is wrong with the benchmark ends the evaluation
    sql = ""
    try:
        sql = writer.write(example.question).sql
        statement = check(sql, database.schema, database.dialect)
        if statement.kind != "query":
            raise DataError("it changes rows")
        found = database.query(statement.sql)
    except LubanError as error:
        return Scored(example=example, sql=sql, right=False, problem=str(error))
    ordered = "order by" in example.sql.lower()
    return Scored(example=example, sql=sql, right=same_rows(found, right, ordered=ordered), problem="")
