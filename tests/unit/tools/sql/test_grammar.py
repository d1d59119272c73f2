"""Every statement that the grammar derives is one that its database takes."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("sqlglot")
pytest.importorskip("duckdb")
pytest.importorskip("llguidance")

from shop import SHOPS, contents
from tiny_models import write_byte_tokenizer
from walk import walk

from luban.generate.token_mask import StructureCompiler
from luban.tokenizer.tokenizer import load_tokenizer
from luban.tools.sql.database import SQLError, open_database
from luban.tools.sql.grammar import structure
from luban.tools.sql.guard import check


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "tokenizer"
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("name", list(SHOPS))
@pytest.mark.parametrize("changes", [False, True])
def test_random_statements_of_the_grammar_are_planned_and_run(name, changes, tokenizer, tmp_path):
    path, rng = SHOPS[name](tmp_path / "shop"), random.Random()
    compiler = StructureCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    before, kinds = contents(path), set()
    with open_database(path) as database:
        made = structure(database.schema, changes=changes)
        for _ in range(15):
            sql = walk(compiler, made, tokenizer, rng)
            if sql is None:
                continue
            statement = check(sql, database.schema, database.dialect)
            kinds.add(statement.kind)
            database.plan(sql)
            if statement.kind == "query":
                database.query(sql)
            else:
                try:
                    database.preview(sql, statement.table)
                except SQLError as error:  # constraints depend on rows
                    assert "constraint" in str(error).lower() or "overflow" in str(error).lower(), (sql, str(error))
    assert contents(path) == before and kinds and (changes or kinds == {"query"})


ACCEPTED = [
    "SELECT name FROM customer",
    "SELECT count(*) FROM customer WHERE city = 'Paris' AND age >= 30",
    "SELECT city, count(*) FROM customer GROUP BY city HAVING count(*) > 1 ORDER BY count(*) DESC LIMIT 1",
    "SELECT name FROM customer WHERE name = 'O''Hara'",
    'SELECT name FROM customer WHERE id NOT IN (SELECT customer_id FROM "order" WHERE amount > 3)',
    "SELECT title FROM product WHERE price = (SELECT max(price) FROM product)",
    'SELECT customer.name, product.title FROM "order" JOIN customer ON "order".customer_id = customer.id '
    'JOIN product ON "order".product_id = product.id WHERE "order".day > \'2024-01-31\'',
    "SELECT name FROM customer WHERE city = 'Paris' EXCEPT SELECT title FROM product",
    "SELECT id, name, city FROM customer WHERE age IN (1, 2, 3) AND city = 'Paris' OR age = 9 AND city = 'Rome'",
    "SELECT min(age), max(age), avg(age) FROM customer",
]
REFUSED = [
    "SELECT nme FROM customer",
    "SELECT price FROM customer",
    "SELECT * FROM shop",
    "SELECT name FROM customer WHERE name = 5",
    "SELECT name FROM customer WHERE age = 'x'",
    "SELECT load_extension('x')",
    "SELECT name FROM customer; DELETE FROM customer",
    "SELECT name FROM customer -- x",
    "PRAGMA x",
    "SELECT sum(name) FROM customer",
    'SELECT product.price FROM "order" JOIN customer ON "order".customer_id = customer.id',
    "DELETE FROM customer",
    # lists that a model which repeats itself would never end
    f"SELECT {', '.join(['name'] * 30)} FROM customer",
    f"SELECT {', '.join(['count(*)'] * 30)} FROM customer",
    f"SELECT city, {', '.join(['count(*)'] * 30)} FROM customer GROUP BY city",
    f"SELECT name FROM customer WHERE {' AND '.join(['age = 1'] * 30)}",
    f"SELECT name FROM customer WHERE {' OR '.join(['age = 1'] * 30)}",
    f"SELECT name FROM customer WHERE age IN ({', '.join(['1'] * 30)})",
]


@pytest.mark.parametrize("sql", ACCEPTED + REFUSED)
def test_statements_are_accepted_where_names_exist(sql, tokenizer, tmp_path):
    compiler = StructureCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    with open_database(SHOPS["sqlite"](tmp_path / "shop")) as database:
        matcher = compiler.matcher(structure(database.schema))
    taken = all(matcher.consume(token) for token in tokenizer.encode(sql))
    taken = taken and (matcher.finished or matcher.consume(tokenizer.stop_ids[0]))
    assert taken == (sql in ACCEPTED)
