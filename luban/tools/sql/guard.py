"""What a statement may be, by its syntax tree: one query, or one change of rows of one table; nothing else passes.

The databases hold the same rules a second time by their own parsers (`luban.tools.sql.sqlite`, `luban.tools.sql.duckdb`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

from luban.core.errors import MissingExtra, nearest
from luban.tools.sql.database import SQLError
from luban.tools.sql.functions import ALLOWED
from luban.tools.sql.schema import Schema

try:
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError
except ImportError:
    raise MissingExtra("sqlglot", "sql", "reading SQL") from None

logging.getLogger("sqlglot").setLevel(logging.CRITICAL)  # it warns of statements that it takes as a whole

MAX_LENGTH = 20_000  # characters of a statement
MAX_DEPTH = 200  # of its tree
QUERIES = (exp.Select, exp.SetOperation, exp.Subquery)
CHANGES = (exp.Insert, exp.Update, exp.Delete)
# What may stand inside of a statement, beside functions: those are looked at by name.
REFUSED = (
    exp.Insert,
    exp.Update,
    exp.Delete,
    exp.Merge,
    exp.DDL,
    exp.Command,
    exp.Into,
    exp.Lock,
    exp.Pragma,
    exp.Attach,
    exp.Set,
    exp.Parameter,
    exp.Placeholder,
    exp.SessionParameter,
    exp.PropertyEQ,
    exp.Lateral,
    exp.Unnest,
)
# Functions that compute, and that sqlglot names otherwise than the databases: strftime, strptime, CASE, CAST, …
RENAMED = (
    "TimeToStr StrToTime StrToDate TsOrDsToDate TsOrDsToTimestamp TsOrDsDiff TsOrDsAdd And Or Xor Case If Cast TryCast Exists "
    "Length Substring StrPosition Upper Lower Trim GroupConcat DateTrunc TimestampTrunc DateDiff DPipe DateAdd Date Ceil Floor"
)
WITHOUT_NAMES = tuple(found for name in RENAMED.split() if (found := getattr(exp, name, None)))


class SQLRefused(SQLError):
    """A statement that isn't run."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One statement that may be run, or previewed."""

    sql: str  # as it was given, without the semicolon at its end
    kind: Literal["query", "change"]
    tree: exp.Expression
    table: str  # that a change changes, as the schema spells it; "" for queries


def check(sql: str, schema: Schema, dialect: str) -> Statement:
    """The statement in `sql`.

    Args:
        dialect: of the database, as sqlglot names it.

    Raises:
        SQLRefused: it can't be read, or holds several statements, an unknown table, a function that isn't known to be
            harmless, or anything that does more than read rows, or change rows of one table.
    """
    tree = _parsed(sql, dialect)
    if isinstance(tree, CHANGES):
        table = _changed_table(tree, schema)
        kind: Literal["query", "change"] = "change"
        inside = [node for node in tree.walk() if node is not tree]
    elif isinstance(tree, QUERIES):
        table, kind, inside = "", "query", list(tree.walk())
    else:
        raise SQLRefused(f"{_named(tree)} is not run here: only SELECT, INSERT, UPDATE and DELETE are")
    named = {cte.alias.lower() for cte in tree.find_all(exp.CTE)}
    for node in inside:
        if isinstance(node, REFUSED):
            raise SQLRefused(f"{_named(node)} is not allowed inside of a {kind}")
        if isinstance(node, exp.Identifier) and not node.quoted and node.name[:1] in "$@:?":
            raise SQLRefused(f"the parameter {node.name} has no value")
        if isinstance(node, exp.Table):
            _require_table(node, schema, named)
        elif isinstance(node, exp.Func):
            _require_harmless(node)
    return Statement(sql=sql.strip().rstrip(";").rstrip(), kind=kind, tree=tree, table=table)


def _parsed(sql: str, dialect: str) -> exp.Expression:
    """The tree of the one statement."""
    if len(sql) > MAX_LENGTH:
        raise SQLRefused(f"the statement has {len(sql)} characters, {MAX_LENGTH} are allowed")
    if "\0" in sql:
        raise SQLRefused("the statement holds a NUL character")
    try:
        found = [tree for tree in sqlglot.parse(sql, read=dialect) if not isinstance(tree, (exp.Semicolon, type(None)))]
        deep = bool(found) and _deeper(found[0], MAX_DEPTH)
    except (SqlglotError, RecursionError) as error:
        raise SQLRefused(f"the statement can't be read: {str(error).splitlines()[0]}") from None
    except Exception as error:  # a parser's own faults on hostile input
        raise SQLRefused(f"the statement can't be read ({type(error).__name__})") from None
    if len(found) != 1:
        raise SQLRefused(
            f"{len(found)} statements were given: exactly one is run" if found else "there is no statement"
        )
    if deep:
        raise SQLRefused(f"the statement is nested more than {MAX_DEPTH} deep")
    tree = found[0]
    assert isinstance(tree, exp.Expression)
    return tree


def _deeper(tree: Any, most: int) -> bool:
    layer: list[Any] = [tree]
    for _ in range(most):
        layer = [child for node in layer for child in node.iter_expressions()]
        if not layer:
            return False
    return True


def _changed_table(tree: exp.Expression, schema: Schema) -> str:
    """The table that a change changes. Raises SQLRefused for forms that can't be previewed."""
    if isinstance(tree, exp.Delete) and (tree.args.get("tables") or tree.args.get("using")):
        raise SQLRefused("DELETE of several tables is not run here")
    if isinstance(tree, exp.Update) and tree.args.get("from_"):
        raise SQLRefused("UPDATE … FROM is not run here: use a subquery")
    for name in ("alternative", "conflict", "overwrite", "is_function", "by_name", "with_"):
        if tree.args.get(name):
            word = "WITH before a change" if name == "with_" else "OR …, ON CONFLICT or REPLACE in a change"
            raise SQLRefused(f"{word} is not run here")
    if tree.args.get("returning"):
        raise SQLRefused("RETURNING is not needed: the preview shows the rows")
    target = tree.this.this if isinstance(tree.this, exp.Schema) else tree.this
    if not isinstance(target, exp.Table):
        raise SQLRefused("a change names one table")
    _require_table(target, schema, set())
    table = schema.by_name[target.name.lower()]
    if table.view:
        raise SQLRefused(f"{table.name} is a view: change the tables behind it")
    return table.name


def _require_table(node: exp.Table, schema: Schema, named: set[str]) -> None:
    """Raise SQLRefused unless the table is the database's or a common table expression."""
    if not isinstance(node.this, exp.Identifier):
        raise SQLRefused(f"{node.this.sql()[:60]} in the place of a table is not allowed")
    if node.args.get("catalog") or (node.db and node.db.lower() != "main"):
        raise SQLRefused(f"tables of other databases are not allowed: {node.sql()[:60]}")
    if node.name.lower() not in schema.by_name and (node.db or node.name.lower() not in named):
        raise SQLRefused(f"the database has no table {node.name}{nearest(node.name, schema.by_name)}")


def _require_harmless(node: exp.Func) -> None:
    """Raise SQLRefused for a function that isn't in the list of those that only compute."""
    if isinstance(node, (exp.Anonymous, exp.AnonymousAggFunc)):
        names = [node.name]
    else:
        names = [] if isinstance(node, WITHOUT_NAMES) else list(node.sql_names())
    if names and not any(name.lower() in ALLOWED for name in names):
        raise SQLRefused(f"the function {names[0].lower()} is not allowed: only functions that compute values are")


def _named(tree: object) -> str:
    """A kind of statement, for people."""
    if isinstance(tree, exp.Command):
        return str(tree.this).upper()
    return type(tree).__name__.upper()
