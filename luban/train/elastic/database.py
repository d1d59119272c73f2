"""What the service of a run must not forget when it is killed: one SQLite file."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS nodes (name TEXT PRIMARY KEY, numbers TEXT NOT NULL);  -- of its workers
CREATE TABLE IF NOT EXISTS workers (
    name TEXT PRIMARY KEY,           -- NODE/NUMBER
    node TEXT NOT NULL,
    incarnation TEXT NOT NULL,       -- of the process that works under this name
    pid INTEGER NOT NULL,
    started TEXT NOT NULL,           -- when the process did, as the system tells it
    waiting INTEGER NOT NULL,        -- 1: has asked for a rank in the next generation
    rank INTEGER                     -- in this generation, or in the last one it was part of
);
CREATE TABLE IF NOT EXISTS steps (
    step INTEGER PRIMARY KEY,        -- whose batch the rows are of, from 0
    generation INTEGER NOT NULL,
    pieces INTEGER NOT NULL,         -- micro-batches
    bounds TEXT NOT NULL,            -- rank r has rows bounds[r] to bounds[r + 1] of every micro-batch
    done TEXT NOT NULL               -- ranks that have finished the step
);
CREATE TABLE IF NOT EXISTS events (at REAL NOT NULL, kind TEXT NOT NULL, who TEXT NOT NULL, detail TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS ledgers (
    incarnation TEXT PRIMARY KEY, worker TEXT NOT NULL, began REAL NOT NULL, until REAL NOT NULL, seconds TEXT NOT NULL
);
"""


def open_database(path: Path) -> sqlite3.Connection:
    """The database at `path`, made where there is none. Every statement is a transaction of its own unless one is begun."""
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=NORMAL")
    for table in ("workers", "ledgers"):  # of a run that an earlier version has begun
        if any(row["name"] == "life" for row in database.execute(f"PRAGMA table_info({table})")):
            database.execute(f"ALTER TABLE {table} RENAME COLUMN life TO incarnation")
    database.executescript(SCHEMA)
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All statements of this block are written, or none where an exception or a killed process ends it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        database.execute("ROLLBACK")
        raise
    database.execute("COMMIT")


class Facts:
    """Named values of a run, as JSON."""

    def __init__(self, database: sqlite3.Connection):
        self.database = database

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where none was set."""
        row = self.database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row["value"])

    def set(self, **values: Any) -> None:
        """Set values by name."""
        rows = [(name, json.dumps(value)) for name, value in values.items()]
        self.database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", rows)


class Events:
    """What happened in a run, oldest first."""

    def __init__(self, database: sqlite3.Connection, now: Any):
        self.database, self.now = database, now

    def add(self, kind: str, who: str = "", **detail: Any) -> None:
        """Record one."""
        row = (self.now(), kind, who, json.dumps(detail))
        self.database.execute("INSERT INTO events VALUES (?, ?, ?, ?)", row)

    def add_once(self, kind: str, who: str = "", **detail: Any) -> bool:
        """Record one unless the very same is known; whether it wasn't."""
        text = json.dumps(detail, sort_keys=True)
        added = self.database.execute(
            "INSERT INTO events SELECT ?, ?, ?, ? WHERE NOT EXISTS "
            "(SELECT 1 FROM events WHERE kind = ? AND who = ? AND detail = ?)",
            (self.now(), kind, who, text, kind, who, text),
        )
        return added.rowcount > 0

    def count(self) -> int:
        """How many there are."""
        return self.database.execute("SELECT COUNT(*) AS events FROM events").fetchone()["events"]

    def since(self, number: int = 0, most: int = -1) -> list[dict[str, Any]]:
        """Those after the first `number`, at most the first `most` of them; -1: all."""
        rows = self.database.execute("SELECT * FROM events ORDER BY rowid LIMIT ? OFFSET ?", (most, number))
        return [{**dict(row), "detail": json.loads(row["detail"])} for row in rows]
