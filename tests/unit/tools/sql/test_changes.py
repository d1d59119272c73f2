"""Changes: the preview shows every row that would change, changes nothing, and is what is then applied."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter

import pytest

pytest.importorskip("sqlglot")
pytest.importorskip("duckdb")

from shop import ROWS, SHOPS, contents, sqlite_shop

from luban.core.errors import ArtifactError
from luban.tools.sql.database import Limits, SQLError, open_database
from luban.tools.sql.guard import SQLRefused, check

STATEMENTS = [
    "UPDATE customer SET age = age + 1 WHERE city = 'Paris'",
    "UPDATE product SET price = price * 2",
    "UPDATE customer SET city = NULL WHERE id = 2",
    "UPDATE customer SET city = city",
    "INSERT INTO customer (id, name) VALUES (9, 'New'), (10, 'Newer')",
    "INSERT INTO product SELECT id + 10, title, price FROM product WHERE price < 100",
    'DELETE FROM "order" WHERE amount > 4',
    'DELETE FROM "order"',
    "DELETE FROM product WHERE id = 99",
    "UPDATE product SET price = (SELECT max(price) FROM product) WHERE title = 'pen'",
]


@pytest.fixture(params=list(SHOPS))
def shop(request, tmp_path):
    return SHOPS[request.param](tmp_path / "shop")


@pytest.mark.parametrize("sql", STATEMENTS)
def test_a_preview_is_the_difference_that_applying_makes(shop, sql):
    before = contents(shop)
    with open_database(shop) as database:
        statement = check(sql, database.schema, database.dialect)
        preview = database.preview(sql, statement.table)
        assert contents(shop) == before
        database.apply(preview, statement.table)
        counts = database.query("SELECT count(*) FROM customer").rows  # and the file can be read again
    after = contents(shop)
    assert counts == ((len(after["customer"]),),)
    for table in ROWS:
        shown = [change for change in preview.changes if change.table == table]
        gone, come = Counter(map(repr, before[table])), Counter(map(repr, after[table]))
        assert Counter(repr(c.before) for c in shown if c.before) == gone - come
        assert Counter(repr(c.after) for c in shown if c.after) == come - gone


def test_cascades_and_triggers_are_in_the_preview(tmp_path):
    path = sqlite_shop(tmp_path / "shop")
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "CREATE TABLE log (text TEXT); CREATE TRIGGER kept AFTER DELETE ON customer BEGIN "
            "INSERT INTO log VALUES ('gone: ' || OLD.name); UPDATE product SET price = price + 1 WHERE id = 3; END;"
        )
    with open_database(path) as database:
        preview = database.preview("DELETE FROM customer WHERE id = 1", "customer")
        assert preview.tables() == {"customer": 1, "log": 1, "order": 2, "product": 1}
        database.apply(preview, "customer")
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT * FROM log").fetchall() == [("gone: Ada",)]
        assert connection.execute('SELECT count(*) FROM "order"').fetchone() == (2,)
        assert not connection.execute("SELECT name FROM sqlite_master WHERE name LIKE 'luban%'").fetchall()


def test_nothing_is_applied_where_the_database_has_changed_since(shop):
    with open_database(shop) as database:
        preview = database.preview("UPDATE product SET price = price + 1", "product")
        again = database.preview("UPDATE product SET price = 0 WHERE id = 1", "product")
        database.apply(again, "product")
        before = contents(shop)
        with pytest.raises(SQLError, match="not as in the preview"):
            database.apply(preview, "product")
    assert contents(shop) == before


def test_large_changes_and_slow_queries_are_stopped(shop):
    with open_database(shop, Limits(changed_rows=2)) as database, pytest.raises(SQLError, match="more than 2 rows"):
        database.preview("UPDATE product SET price = price + 1", "product")
    endless = "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    with open_database(shop, Limits(seconds=0.2)) as database:
        assert check(endless, database.schema, database.dialect)
        with pytest.raises(SQLError, match="longer than it may"):
            database.query(endless)


def test_rows_are_cut_at_the_limit(shop):
    with open_database(shop, Limits(rows=2)) as database:
        answer = database.query("SELECT id FROM product ORDER BY id")
        assert answer.rows == ((1,), (2,)) and answer.cut
        assert not database.query("SELECT id FROM product WHERE id < 3").cut


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT OR REPLACE INTO customer VALUES (1, 'x', 'y', 1)",
        "REPLACE INTO customer VALUES (1, 'x', 'y', 1)",
        "UPDATE OR REPLACE customer SET id = 2 WHERE id = 1",
        "DELETE FROM customer RETURNING *",
        "DELETE FROM nothing",
        "UPDATE customer SET name = load_extension('x')",
        "INSERT INTO sqlite_master VALUES (1)",
        "WITH x AS (SELECT 1) DELETE FROM customer",
        "INSERT INTO customer VALUES (1, 'x', 'y', 1) ON CONFLICT DO NOTHING",
        "UPDATE customer SET name = title FROM product",
    ],
)
def test_changes_that_cannot_be_previewed_are_refused(shop, sql):
    with open_database(shop) as database, pytest.raises(SQLRefused):
        check(sql, database.schema, database.dialect)


def test_constraints_are_kept(shop):
    before = contents(shop)
    with open_database(shop) as database:
        for sql in ("INSERT INTO customer VALUES (1, 'x', 'y', 1)", "UPDATE customer SET name = NULL"):
            with pytest.raises(SQLError, match="onstraint"):
                database.preview(sql, "customer")
    assert contents(shop) == before


def test_files_that_are_no_usable_database_are_named(tmp_path):
    (tmp_path / "text").write_text("not a database, but some text")
    (tmp_path / "empty").touch()
    (tmp_path / "torn").write_bytes(sqlite_shop(tmp_path / "whole").read_bytes()[:100] + b"\xff" * 5000)
    cases = {"missing": "no database", ".": "folder", "text": "not a database", "empty": "no table", "torn": "damaged"}
    for name, words in cases.items():
        with pytest.raises(ArtifactError, match=words):
            open_database(tmp_path / name)


def test_a_locked_database_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.tools.sql.sqlite.BUSY_SECONDS", 0.01)
    path = sqlite_shop(tmp_path / "shop")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ArtifactError, match="locked by another program"):
        open_database(path)
    other.execute("ROLLBACK")
    with open_database(path) as database:
        other.execute("BEGIN IMMEDIATE")
        assert database.query("SELECT 1").rows == ((1,),)
        with pytest.raises(ArtifactError, match="locked by another program"):
            database.preview("DELETE FROM product", "product")
    other.close()


def test_a_file_that_cannot_be_written_is_read_and_not_changed(shop):
    shop.chmod(0o444)
    with open_database(shop) as database:
        assert database.query("SELECT count(*) FROM product").rows == ((3,),)
        if not _writable(shop):
            with pytest.raises(ArtifactError, match="can't be changed"):
                database.preview("DELETE FROM product", "product")


def _writable(path) -> bool:
    try:
        path.open("r+b").close()
    except OSError:
        return False
    return True


def test_names_with_special_characters(tmp_path):
    path = tmp_path / "a?b#c%41 é.db"
    sqlite_shop(path)
    with open_database(path) as database:
        assert len(database.schema.tables) == 3


def test_random_updates_agree_with_their_previews(shop):
    rng = random.Random()
    for _ in range(5):
        low, factor = rng.randrange(4), rng.randrange(1, 5)
        sql = f"UPDATE product SET price = price * {factor} WHERE id > {low}"
        before = contents(shop)["product"]
        with open_database(shop) as database:
            database.apply(database.preview(sql, "product"), "product")
        assert contents(shop)["product"] == [(i, t, price * factor if i > low else price) for i, t, price in before]
