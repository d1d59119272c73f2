"""A small shop in both databases' files."""

from __future__ import annotations

import sqlite3
from pathlib import Path

TABLES = (
    "CREATE TABLE customer (id INTEGER PRIMARY KEY, name VARCHAR NOT NULL, city VARCHAR, age INTEGER)",
    "CREATE TABLE product (id INTEGER PRIMARY KEY, title VARCHAR NOT NULL, price DOUBLE)",
    'CREATE TABLE "order" (id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customer(id){cascade}, '
    "product_id INTEGER REFERENCES product(id), amount INTEGER NOT NULL, day DATE)",
)
ROWS = {
    "customer": [(1, "Ada", "Paris", 36), (2, "Bob", "Rome", 50), (3, "Cy", "Paris", None), (4, "O'Hara", None, 20)],
    "product": [(1, "pen", 1.5), (2, "lamp", 30.0), (3, "desk", 200.0)],
    "order": [(1, 1, 1, 10, "2024-01-05"), (2, 1, 2, 1, "2024-02-01"), (3, 2, 1, 5, "2024-02-03"), (4, 3, 3, 1, None)],
}


def fill(execute, cascade: str = "") -> None:
    """Make the tables and their rows."""
    for table in TABLES:
        execute(table.format(cascade=cascade))
    for table, rows in ROWS.items():
        for row in rows:
            execute(f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(row))})', row)


def sqlite_shop(path: Path) -> Path:
    """As a SQLite file; orders go with their customers."""
    connection = sqlite3.connect(path)
    fill(connection.execute, " ON DELETE CASCADE")
    connection.commit()
    connection.close()
    return path


def duckdb_shop(path: Path) -> Path:
    """As a DuckDB file."""
    import duckdb

    connection = duckdb.connect(str(path))
    fill(connection.execute)
    connection.close()
    return path


SHOPS = {"sqlite": sqlite_shop, "duckdb": duckdb_shop}


def contents(path: Path) -> dict[str, list[tuple]]:
    """All rows, by a connection of its own."""
    if path.read_bytes().startswith(b"SQLite"):
        connection = sqlite3.connect(path)
    else:
        import duckdb

        connection = duckdb.connect(str(path), read_only=True)
    found = {table: connection.execute(f'SELECT * FROM "{table}" ORDER BY 1').fetchall() for table in ROWS}
    connection.close()
    return found
