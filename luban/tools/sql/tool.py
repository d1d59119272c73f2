"""A database as a tool: a model asks it with SQL, which is checked and run read-only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luban.tools.sql.ask import prompt_of
from luban.tools.sql.database import Limits, SQLError, open_database
from luban.tools.sql.guard import SQLRefused, check
from luban.tools.sql.linking import Linked
from luban.tools.tool import Tool

ROWS = 50  # that a model reads
SECONDS = 10.0


def database_tool(path: Path) -> Tool:
    """A tool `query_database(sql)` over a SQLite or DuckDB file; its description holds the tables.

    Raises:
        ArtifactError: as `open_database`.
    """
    limits = Limits(seconds=SECONDS, rows=ROWS)
    with open_database(path, limits) as database:
        tables = prompt_of("", Linked(schema=database.schema, values=())).removesuffix("\nQuestion: ")

    def query_database(sql: str) -> dict[str, Any]:
        with open_database(path, limits) as database:  # SQLite's connections belong to the thread that made them
            statement = check(sql, database.schema, database.dialect)
            if statement.kind != "query":
                raise SQLRefused("only SELECT is run here")
            try:
                answer = database.query(statement.sql)
            except SQLError as error:
                return {"error": str(error)}
        return {"columns": answer.columns, "rows": answer.rows, **({"more": True} if answer.cut else {})}

    schema = {
        "type": "object",
        "properties": {"sql": {"type": "string", "minLength": 1, "maxLength": 4000}},
        "required": ["sql"],
        "additionalProperties": False,
    }
    about = f"Runs one SELECT on the {database.dialect} database {path.name}. {tables}"
    return Tool(name="query_database", description=about, parameters=schema, function=query_database)
