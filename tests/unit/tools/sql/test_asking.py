"""Linking, explanations, index suggestions, Spider's layout, and the command from a question to rows."""

from __future__ import annotations

import json
import random
import sqlite3

import pytest

pytest.importorskip("sqlglot")
pytest.importorskip("duckdb")
pytest.importorskip("llguidance")

from scripted import ScriptedEngine
from shop import SHOPS, contents, sqlite_shop
from tiny_models import write_byte_tokenizer

from luban.cli.main import main
from luban.core.bm25 import BM25, words
from luban.core.errors import DataError
from luban.generate.token_mask import StructureCompiler
from luban.tokenizer.tokenizer import load_tokenizer
from luban.tools.sql.ask import SQLWriter, prompt_of
from luban.tools.sql.database import Answer, open_database
from luban.tools.sql.explain import explain
from luban.tools.sql.generated import conversations, generate
from luban.tools.sql.grammar import structure
from luban.tools.sql.guard import check
from luban.tools.sql.indexes import suggest_indexes
from luban.tools.sql.linking import Linker
from luban.tools.sql.spider import evaluate, read_spider, same_rows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes") / "tokenizer"
    write_byte_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture
def shop(tmp_path):
    return sqlite_shop(tmp_path / "shop.db")


def test_bm25_is_its_formula():
    import math

    texts = [["a", "b", "a"], ["b"], ["c", "c", "d", "e"]]
    mean = 8 / 3
    idf_a, idf_b = math.log(1 + 2.5 / 1.5), math.log(1 + 1.5 / 2.5)

    def part(idf, count, length):
        return idf * count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean))

    assert BM25(texts).scores(["a", "b", "b", "x"]) == pytest.approx(
        [part(idf_a, 2, 3) + part(idf_b, 1, 3), part(idf_b, 1, 1), 0.0]
    )
    assert words("customerId of Cities, order_lines 北京") == [
        "customer",
        "id",
        "of",
        "city",
        "order",
        "line",
        "北",
        "京",
    ]


@pytest.mark.parametrize("name", list(SHOPS))
def test_questions_are_linked_to_tables_and_values(name, tmp_path):
    with open_database(SHOPS[name](tmp_path / "shop")) as database:
        linker = Linker(database, tables=1)
        linked = linker.link("How many customers live in paris?")
        assert [t.name for t in linked.schema.tables] == ["customer"]
        assert [(v.table, v.column, v.text) for v in linked.values] == [("customer", "city", "Paris")]
        assert [t.name for t in linker.link("Which products are expensive by price?").schema.tables] == ["product"]
        two = Linker(database, tables=2).link("customer and product titles")
        assert {t.name for t in two.schema.tables} == {"customer", "product", "order"} and len(two.schema.keys) == 2
        prompt = prompt_of("Who is O'hara?", linker.link("Who is O'hara?"))
        assert "customer.name = 'O''Hara'" in prompt and "customer(id number, name text" in prompt


WORDS = [
    ("SELECT count(*) FROM customer", "Shows the number of rows from customer."),
    (
        "SELECT DISTINCT city FROM customer WHERE age >= 30 OR city IS NOT NULL",
        "Shows the different values of city from customer, of the rows where age is at least 30 or city is known.",
    ),
    (
        "SELECT city, avg(age) FROM customer GROUP BY city HAVING count(*) > 1 ORDER BY avg(age) DESC LIMIT 3",
        "Shows city and the average of age from customer, for each city, of the groups where the number of rows is more "
        "than 1, ordered by the average of age, largest first, only the first 3.",
    ),
    (
        'SELECT name FROM customer WHERE id NOT IN (SELECT customer_id FROM "order")',
        'Shows name from customer, of the rows where id is not among customer_id from "order".',
    ),
    (
        "UPDATE product SET price = 1 WHERE title = 'pen'",
        "Sets price to 1 in the rows of product where title is 'pen'.",
    ),
    ("DELETE FROM product", "Deletes every row of product."),
    ("INSERT INTO product (id, title) VALUES (7, 'x')", "Adds 1 row to product."),
]


@pytest.mark.parametrize(("sql", "said"), WORDS)
def test_statements_in_words(shop, sql, said):
    with open_database(shop) as database:
        assert explain(check(sql, database.schema, "sqlite").tree, "sqlite") == said


def test_suggested_indexes_are_used(shop):
    before = shop.read_bytes()
    with open_database(shop) as database:
        statement = check("SELECT name FROM customer WHERE city = 'Paris' AND age > 3", database.schema, "sqlite")
        (found,) = suggest_indexes(statement, database)
        assert found.sql == "CREATE INDEX idx_customer_city_age ON customer (city, age)"
        assert found.before.startswith("SCAN") and "SEARCH" in found.after
        for fast in ("SELECT name FROM customer WHERE id = 1", "SELECT * FROM customer"):
            assert not suggest_indexes(check(fast, database.schema, "sqlite"), database)
    assert shop.read_bytes() == before
    with sqlite3.connect(shop) as connection:
        connection.execute(found.sql)
    with open_database(shop) as database:
        assert not suggest_indexes(check(statement.sql, database.schema, "sqlite"), database)
        assert "idx_customer_city_age" in database.plan(statement.sql)[0]


def answer(*rows, cut=False):
    return Answer(columns=tuple("abc"[: len(rows[0])]) if rows else ("a",), rows=rows, cut=cut)


def test_rows_are_compared_as_multisets_with_columns_in_any_order():
    assert same_rows(answer((1, "x"), (2, "y")), answer(("y", 2.0), ("x", 1)), ordered=False)
    assert not same_rows(answer((1, "x"), (2, "y")), answer(("y", 2), ("x", 1)), ordered=True)
    assert not same_rows(answer((1,), (1,)), answer((1,)), ordered=False)
    assert not same_rows(answer((1, "y"), (2, "x")), answer((1, "x"), (2, "y")), ordered=False)
    assert same_rows(answer((0.1 + 0.2,)), answer((0.3,)), ordered=False)


def test_generated_questions_have_answers_that_the_grammar_derives(tmp_path, tokenizer):
    out = tmp_path / "made"
    generate(out, databases=5, questions=6, seed=random.randrange(1 << 30))
    train, dev = read_spider(out / "train.json"), read_spider(out)
    assert len(train) == 24 and len(dev) == 6 and not {e.database for e in train} & {e.database for e in dev}
    compiler = StructureCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    for example in (*train, *dev):
        with open_database(example.database) as database:
            matcher = compiler.matcher(structure(Linker(database).link(example.question).schema))
            assert all(matcher.consume(token) for token in tokenizer.encode(example.sql)), example.sql
            assert matcher.finished or matcher.consume(tokenizer.stop_ids[0]), example.sql
            assert database.query(example.sql).columns
    rows = list(conversations(out / "dev.json"))
    assert rows[0]["messages"][1]["content"] == dev[0].sql and dev[0].question in rows[0]["messages"][0]["content"]
    with pytest.raises(DataError, match="isn't empty"):
        generate(out, databases=2, questions=1, seed=0)


def test_execution_accuracy_counts_right_rows(tmp_path, tokenizer):
    out = tmp_path / "made"
    generate(out, databases=5, questions=6, seed=1)
    examples = read_spider(out)
    script = [e.sql for e in examples[:3]] + ["SELECT nothing", "DELETE FROM x", "SELECT 'never', 1, 2"]
    engine = ScriptedEngine(tokenizer, script)
    scored = list(evaluate(engine, examples, constrained=False))
    assert [one.right for one in scored] == [True] * 3 + [False] * 3
    assert scored[4].problem and not scored[5].problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "Spider"),
        ("{}", "x"),
        ('[{"db_id": "a"}]', "question"),
        ('[{"db_id":"a","question":"","query":""}]', "database a"),
    ],
)
def test_files_that_are_not_spiders_are_named(tmp_path, text, words):
    (tmp_path / "dev.json").write_text(text)
    if text == "{}":
        assert read_spider(tmp_path) == []
        return
    with pytest.raises(DataError, match=words):
        read_spider(tmp_path)


def test_a_model_is_held_to_the_schema_and_to_reading(shop, tokenizer):
    with open_database(shop) as database:
        engine = ScriptedEngine(
            tokenizer, ["SELECT name FROM customer; DROP TABLE customer", "DELETE FROM product", "DROP"]
        )
        assert SQLWriter(engine, database).write("names?").sql == "SELECT name FROM customer"
        assert SQLWriter(engine, database, changes=True).write("clear").sql == "DELETE FROM product"
        SQLWriter(engine, database, changes=True).write("drop")
        assert engine.refused[-1] == "D"


@pytest.fixture
def tell(monkeypatch, capsys, tokenizer):
    """Run `luban sql` with a model that says a text."""

    def run(*argv, says=()):
        monkeypatch.setattr("luban.cli.sql._engine", lambda args: ScriptedEngine(tokenizer, says))
        code = main(["sql", *map(str, argv)])
        return code, *capsys.readouterr()

    return run


def test_a_question_becomes_rows(shop, tell):
    said = "SELECT name FROM customer WHERE city = 'Paris'"
    code, out, err = tell(shop, "Who lives in Paris?", "--model", "m", "--explain", says=[said])
    assert code == 0 and out.split() == ["name", "----", "Ada", "Cy"] and said in err and "Shows name" in err
    code, out, _ = tell(shop, "--sql", said, "--json", "--suggest-indexes")
    assert json.loads(out)["rows"] == [["Ada"], ["Cy"]] and len(json.loads(out)["indexes"]) == 1


def test_a_change_is_made_only_when_it_is_confirmed(shop, tell, monkeypatch):
    change, before = "UPDATE product SET price = 2.0 WHERE title = 'pen'", contents(shop)
    code, out, err = tell(shop, "Pens cost 2", "--model", "m", says=[change])
    assert code == 1 and "product: 1 row" in out and "price 1.5" in out and "nothing was changed" in err
    code, out, _ = tell(shop, "--sql", change, "--json")
    assert code == 1 and json.loads(out)["applied"] is False and contents(shop) == before
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for said, code in (("n", 1), ("", 1), ("y", 0)):
        assert contents(shop) == before
        monkeypatch.setattr("builtins.input", lambda prompt, said=said: said)
        assert tell(shop, "--sql", change)[0] == code
    assert contents(shop)["product"][0] == (1, "pen", 2.0)
    assert tell(shop, "--sql", "DELETE FROM customer WHERE id = 4", "--apply")[0] == 0
    assert len(contents(shop)["customer"]) == 3
    assert tell(shop, "--sql", "DELETE FROM customer WHERE id = 4", "--apply")[:2] == (0, "no row would change\n")


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ((), 2, "takes a database"),
        (("{shop}",), 2, "QUESTION"),
        (("{shop}", "q"), 2, "--model"),
        (("{shop}", "q", "--sql", "SELECT 1"), 2, "either"),
        (("{shop}", "--sql", "DELETE FROM product", "--apply", "--read-only"), 2, "--read-only"),
        (("{shop}", "--sql", "DELETE FROM product", "--read-only"), 1, "--read-only"),
        (("{shop}", "--sql", "DROP TABLE product", "--apply"), 1, "DROP"),
        (("{shop}", "--sql", "SELECT 1; DELETE FROM product", "--apply"), 1, "2 statements"),
        (("missing.db", "--sql", "SELECT 1"), 1, "no database"),
        (("--eval", "missing.json", "--model", "m"), 1, "can't be read"),
        (("--eval", "x.json"), 2, "--model"),
        (("--eval", "x.json", "--model", "m", "--explain"), 2, "--explain does nothing with --eval"),
        (("{shop}", "--sql", "SELECT 1", "--limit", "3"), 2, "--limit does nothing without --eval"),
        (("{shop}", "--sql", "SELECT 1", "--no-grammar"), 2, "--no-grammar does nothing without --eval"),
        (("{shop}", "--sql", "SELECT 1", "--model", "m"), 2, "--model does nothing with --sql"),
        (("{shop}", "--sql", "DELETE FROM product", "--suggest-indexes"), 2, "for queries of SQLite"),
        (("{duck}", "--sql", "SELECT name FROM customer", "--suggest-indexes"), 2, "for queries of SQLite"),
    ],
)
def test_bad_calls_get_one_line(shop, tmp_path, tell, argv, code, words):
    before, duck = contents(shop), SHOPS["duckdb"](tmp_path / "duck")
    found, out, err = tell(*(word.format(shop=shop, duck=duck) for word in argv))
    assert found == code and words in err and len(err.strip().splitlines()) == 1 and not out
    assert contents(shop) == before
