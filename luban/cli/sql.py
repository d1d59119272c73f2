"""`luban sql DATABASE QUESTION --model MODEL`: ask a database in words."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from luban.core.arguments import parse, refuse_flags
from luban.core.errors import UsageError
from luban.core.log import say

if TYPE_CHECKING:
    from luban.serve.engine import Engine
    from luban.tools.sql.database import Database, Preview
    from luban.tools.sql.guard import Statement

OF_ONE = ("explain", "suggest_indexes", "apply", "read_only", "rows")  # flags of a single question or statement
OF_EVAL = ("limit", "no_grammar")  # flags of --eval
NOT_APPLIED = 1  # exit code of a change that wasn't made
EXAMPLES = """
luban sql shop.db "Which customers live in Paris?" --model runs/sql
luban sql shop.duckdb "How many orders has each customer?" --model runs/sql --explain --json
luban sql shop.db "Delete the orders before 2020" --model runs/sql            # shows the rows, then asks
luban sql shop.db --sql "UPDATE product SET price = price * 1.1" --apply
luban sql shop.db --sql "SELECT name FROM customer WHERE city = 'Paris'" --suggest-indexes
luban sql --eval spider/dev.json --model runs/sql
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    database: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATABASE")] = ""  # a SQLite or DuckDB file
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")] = ""  # in words, for --model
    model: str | None = None  # that writes the statement: a run, a checkpoint, a Hugging Face directory, …
    sql: str | None = None  # a statement, in place of a question
    explain: bool = False  # say in words what the statement does, and how the database runs it
    suggest_indexes: bool = False  # indexes that the query would use, proved by its plan (SQLite)
    apply: bool = False  # make the change without asking
    read_only: bool = False  # refuse every change
    json: bool = False  # one JSON object on standard output
    rows: int = 100  # of a result that are shown
    seconds: float = 30.0  # that a statement may take
    eval: Path | None = None  # questions in Spider's layout (dev.json, or its folder): execution accuracy of --model
    limit: int | None = None  # of --eval: the first so many questions
    no_grammar: bool = False  # of --eval: don't hold statements to the schema
    adapter: str | None = None  # a run of adapters or a PEFT directory, over MODEL
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16, int8, fp8 (GPU)


def run(argv: Sequence[str]) -> int:
    """Answer a question, preview or make a change, or measure a model."""
    about = "Ask a SQLite or DuckDB database in words. Nothing is changed without a preview and a confirmation."
    args = parse(Arguments, argv, verb="sql", about=about, examples=EXAMPLES)
    _require_fitting(args, argv)
    if args.eval is not None:
        return _evaluate(args)
    from luban.tools.sql.database import Limits, open_database
    from luban.tools.sql.guard import SQLRefused, check

    with open_database(args.database, Limits(seconds=args.seconds, rows=args.rows)) as database:
        sql = args.sql if args.sql is not None else _written(args, database)
        statement = check(sql, database.schema, database.dialect)
        if args.read_only and statement.kind == "change":
            raise SQLRefused(f"--read-only: {statement.sql} would change {statement.table}")
        if args.suggest_indexes and (database.dialect != "sqlite" or statement.kind == "change"):
            raise UsageError(
                f"--suggest-indexes: for queries of SQLite, and this is a {statement.kind} of {database.dialect}"
            )
        found: dict[str, Any] = {"sql": statement.sql, "kind": statement.kind}
        if not args.json:
            say(statement.sql)
        if args.explain:
            found |= _explained(statement, database, quiet=args.json)
        if statement.kind == "change":
            return _change(args, database, statement, found)
        return _query(args, database, statement, found)


def _require_fitting(args: Arguments, argv: Sequence[str]) -> None:
    """Raise UsageError for options that say nothing, or two things."""
    if args.eval is not None:
        if args.model is None or args.database or args.sql is not None:
            raise UsageError("--eval FILE takes --model MODEL and no database: the file names its own")
        refuse_flags(argv, OF_ONE, "with --eval")
        return
    refuse_flags(argv, OF_EVAL, "without --eval FILE")
    if args.sql is not None:
        refuse_flags(argv, ("model", "adapter", "device", "dtype"), "with --sql, which no model writes")
    if not args.database:
        raise UsageError("luban sql takes a database: luban sql DATABASE QUESTION --model MODEL (see luban sql --help)")
    if (args.sql is None) == (not args.question):
        raise UsageError("give either a QUESTION in words with --model MODEL, or a statement as --sql STATEMENT")
    if args.sql is None and args.model is None:
        raise UsageError("a QUESTION needs --model MODEL, which writes the statement")
    if args.apply and args.read_only:
        raise UsageError("--apply makes a change and --read-only refuses it: give one of them")
    if args.rows < 1 or args.seconds <= 0:
        raise UsageError("--rows must be at least 1 and --seconds larger than 0")


def _engine(args: Arguments) -> Engine:
    from luban.load.model import load_model
    from luban.serve.engine import Engine

    assert args.model is not None
    return Engine(load_model(args.model, device=args.device, dtype=args.dtype, adapter=args.adapter))


def _written(args: Arguments, database: Database) -> str:
    """The model's statement."""
    from luban.tools.sql.ask import SQLWriter

    return SQLWriter(_engine(args), database, changes=not args.read_only).write(args.question).sql


def _explained(statement: Statement, database: Database, *, quiet: bool) -> dict[str, Any]:
    """The statement in words, and the database's plan for it."""
    from luban.tools.sql.explain import explain

    words, plan = explain(statement.tree, database.dialect), database.plan(statement.sql)
    if not quiet:
        say("\n".join([words, *(f"  {step}" for step in plan)]))
    return {"explanation": words, "plan": plan}


def _query(args: Arguments, database: Database, statement: Statement, found: dict[str, Any]) -> int:
    """Plan the query, run it and print its rows."""
    from luban.tools.sql import show
    from luban.tools.sql.indexes import suggest_indexes

    database.plan(statement.sql)  # a dry run: what can't run is refused before anything is read
    suggestions = suggest_indexes(statement, database) if args.suggest_indexes else []
    answer = database.query(statement.sql)
    if args.json:
        found |= {"columns": answer.columns, "rows": show.rows(answer.rows), "more": answer.cut}
        found |= {"indexes": [s.sql for s in suggestions]} if args.suggest_indexes else {}
        print(json.dumps(found, ensure_ascii=False))
        return 0
    print(show.table(answer))
    for suggestion in suggestions:
        say(f"{suggestion.sql}   -- {suggestion.before} becomes {suggestion.after}")
    if args.suggest_indexes and not suggestions:
        say("no index of one or two columns would change how the query is run")
    return 0


def _change(args: Arguments, database: Database, statement: Statement, found: dict[str, Any]) -> int:
    """Preview the change, and make it where it is confirmed."""
    from luban.tools.sql import show

    preview = database.preview(statement.sql, statement.table)
    applied = False
    if not args.json:
        print(show.preview(preview, database.schema), flush=True)
    if preview.changes and (args.apply or (not args.json and _confirmed())):
        database.apply(preview, statement.table)
        applied = True
    if args.json:
        print(json.dumps({**found, "changes": _changes(preview), "applied": applied}, ensure_ascii=False))
    elif applied:
        say("applied")
    elif preview.changes:
        say("nothing was changed: --apply makes the change")
    return 0 if applied or not preview.changes else NOT_APPLIED


def _changes(preview: Preview) -> list[dict[str, Any]]:
    from luban.tools.sql import show

    return [
        {
            "table": c.table,
            **{side: row and show.rows([row])[0] for side, row in (("before", c.before), ("after", c.after))},
        }
        for c in preview.changes
    ]


def _confirmed() -> bool:
    """Whether the person at the terminal says yes; false where there is none."""
    if not sys.stdin.isatty():
        return False
    try:
        return input("make this change? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _evaluate(args: Arguments) -> int:
    """Print the execution accuracy of a model, and in words what was wrong."""
    from luban.tools.sql.spider import evaluate, read_spider

    assert args.eval is not None
    examples = read_spider(args.eval)[: args.limit]
    scored = []
    for one in evaluate(_engine(args), examples, constrained=not args.no_grammar, seconds=args.seconds):
        scored.append(one)
        if not one.right and not args.json:
            say(f"{one.example.question}\n  {one.sql}\n  {one.problem or 'other rows than ' + one.example.sql}")
    count = max(len(scored), 1)
    figures = {
        "questions": len(scored),
        "execution_accuracy": sum(one.right for one in scored) / count,
        "ran": sum(not one.problem for one in scored) / count,
    }
    print(json.dumps(figures) if args.json else "\n".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return 0
