"""Statements that must not pass: 200 attempts by each database, through the parser, and past it through the connection."""

from __future__ import annotations

import pytest

pytest.importorskip("sqlglot")
pytest.importorskip("duckdb")

from attempts import ATTEMPTS, HARMLESS
from shop import SHOPS, contents

from luban.core.errors import LubanError
from luban.tools.sql.database import Limits, open_database
from luban.tools.sql.guard import SQLRefused, check


@pytest.fixture(scope="module", params=list(SHOPS))
def shop(request, tmp_path_factory):
    return SHOPS[request.param](tmp_path_factory.mktemp("shop") / f"shop.{request.param}")


def test_there_are_two_hundred_different_attempts():
    assert len(set(ATTEMPTS)) >= 200


def test_no_attempt_passes_as_a_query(shop):
    before, files = contents(shop), set(shop.parent.iterdir())
    with open_database(shop) as database:
        passed = []
        for sql in ATTEMPTS:
            try:
                statement = check(sql, database.schema, database.dialect)
            except SQLRefused:
                continue
            if statement.kind == "query":
                passed.append(sql)
        assert not passed
    assert contents(shop) == before and set(shop.parent.iterdir()) == files


def test_the_connection_changes_nothing_even_without_the_parser(shop):
    before, files = contents(shop), set(shop.parent.iterdir())
    with open_database(shop, Limits(seconds=5)) as database:
        for sql in (sql for sql in ATTEMPTS if "000000000" not in sql):  # those only cost time and memory
            for run in (database.query, database.plan):
                try:
                    run(sql)
                except LubanError:
                    continue
    assert contents(shop) == before and set(shop.parent.iterdir()) == files


@pytest.mark.parametrize("sql", HARMLESS)
def test_queries_pass_and_run(shop, sql):
    with open_database(shop) as database:
        assert check(sql, database.schema, database.dialect).kind == "query"
        assert database.plan(sql) and database.query(sql).columns


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT * FROM custmer", "did you mean 'customer'"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("  ;  ", "no statement"),
        ("SELEC 1", ""),
        ("SELECT " + "(" * 3000 + "1" + ")" * 3000, "statement"),
        ("SELECT '" + "x" * 30_000 + "'", "characters"),
        ("DROP TABLE customer", "DROP"),
        ("PRAGMA table_info(customer)", "PRAGMA"),
    ],
)
def test_refusals_say_what_was_wrong(shop, sql, words):
    with open_database(shop) as database, pytest.raises(SQLRefused) as refusal:
        check(sql, database.schema, database.dialect)
    assert words.lower() in str(refusal.value).lower()
