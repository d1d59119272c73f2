"""A generated benchmark in Spider's layout: small databases drawn from a pool of tables, questions about them in words.

Databases of the two files share words and none of their schemas; every query is one that the grammar derives.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from luban.core.errors import DataError

POOLS = {  # values of text columns
    "city": "Paris Rome Berlin Madrid Vienna Oslo Lisbon Dublin Prague Athens Warsaw Geneva Lyon Turin Bonn Kyoto",
    "color": "red blue green black white yellow orange purple silver brown",
    "name": "Ada Bob Cy Dana Eve Finn Gus Hana Ivo Jan Kim Leo Mia Nils Olga Per Rosa Sven Tara Uwe Vera Wim Yara Zoe",
    "title": "Dawn River Stone Amber Cedar Comet Delta Ember Fable Grove Harbor Iris Jade Lotus Maple Nova Opal Pearl",
    "category": "classic modern basic premium standard special",
    "country": "France Italy Spain Norway Japan Greece Poland Ireland Austria Portugal Kenya Chile",
}
TEXTS = {column: values.split() for column, values in POOLS.items()}
NUMBERS = {"age": (18, 80), "price": (1, 500), "year": (1950, 2024), "weight": (1, 200), "rating": (1, 10)}
NUMBERS |= {"salary": (1000, 9000), "capacity": (10, 900), "pages": (20, 900), "height": (10, 250)}
TABLES = {  # word of a table → columns that it may have, the first always
    "singer": "name age country salary city",
    "teacher": "name age city salary rating",
    "driver": "name age country rating salary",
    "customer": "name city age country rating",
    "player": "name height weight country age",
    "book": "title year pages price category",
    "film": "title year rating category country",
    "car": "name price year weight color",
    "house": "name price year city color height",
    "shop": "name city year rating capacity",
    "school": "name city capacity year country",
    "team": "name city rating year country",
    "hotel": "name city capacity price rating",
    "museum": "name city year capacity price",
    "product": "name price color weight category",
    "plant": "name height color price category",
    "song": "title year rating category price",
    "machine": "name weight price year category",
}


@dataclass(frozen=True)
class Entity:
    """A table of a drawn database."""

    name: str
    texts: tuple[str, ...]
    numbers: tuple[str, ...]
    parent: str = ""  # table that its key points to

    @property
    def plural(self) -> str:
        return f"{self.name}s" if not self.name.endswith(("s", "y")) else f"{self.name}es"

    @property
    def first(self) -> str:
        """The column that names its rows."""
        return self.texts[0]


@dataclass(frozen=True)
class Drawn:
    """A drawn database: tables and their rows."""

    name: str
    entities: tuple[Entity, ...]
    values: dict[tuple[str, str], list[str | int]]  # (table, column) → values of its rows


def generate(out: Path, *, databases: int, questions: int, seed: int, held_out: float = 0.2) -> None:
    """Write `train.json`, `dev.json` and `database/` below `out`.

    Args:
        databases: in all, of which the share `held_out` is asked about in dev.json alone.
        questions: about each.

    Raises:
        DataError: `out` holds something already.
    """
    if out.exists() and any(out.iterdir()):
        raise DataError(f"{out} isn't empty: give a new folder")
    rng, seen = random.Random(seed), set()
    rows: dict[str, list[dict[str, str]]] = {"train": [], "dev": []}
    for number in range(databases):
        entities = _entities(rng)
        while entities in seen:
            entities = _entities(rng)
        seen.add(entities)
        drawn = _filled(f"db_{number}", entities, rng)
        _write(drawn, out / "database" / drawn.name, rng)
        part = "dev" if number >= databases * (1 - held_out) else "train"
        for _ in range(questions):
            question, sql = rng.choice(TEMPLATES)(drawn, rng)
            rows[part].append({"db_id": drawn.name, "question": question, "query": sql})
    for part, found in rows.items():
        (out / f"{part}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


def _entities(rng: random.Random) -> tuple[Entity, ...]:
    """Two or three tables; each after the first may point to the one before."""
    found: list[Entity] = []
    for name in rng.sample(sorted(TABLES), rng.randint(2, 3)):
        first, *rest = TABLES[name].split()
        columns = [first, *sorted(rng.sample(rest, rng.randint(2, len(rest))), key=rest.index)]
        numbers = tuple(column for column in columns if column in NUMBERS)
        if not numbers:
            numbers = (next(column for column in rest if column in NUMBERS),)
        parent = found[-1].name if found and (len(found) == 1 or rng.random() < 0.5) else ""
        found.append(Entity(name, tuple(c for c in columns if c in TEXTS), numbers, parent))
    return tuple(found)


def _filled(name: str, entities: tuple[Entity, ...], rng: random.Random) -> Drawn:
    values: dict[tuple[str, str], list[str | int]] = {}
    for entity in entities:
        count = rng.randint(6, 16)
        for column in entity.texts:
            pool = TEXTS[column]
            values[entity.name, column] = list(
                rng.sample(pool, count) if column == entity.first and count <= len(pool) else rng.choices(pool, k=count)
            )
        for column in entity.numbers:
            low, high = NUMBERS[column]
            values[entity.name, column] = (
                list(rng.sample(range(low, high + 1), count))
                if high - low > 20
                else [rng.randint(low, high) for _ in range(count)]
            )
    return Drawn(name, entities, values)


def _write(drawn: Drawn, folder: Path, rng: random.Random) -> None:
    folder.mkdir(parents=True)
    connection = sqlite3.connect(folder / f"{drawn.name}.sqlite")
    counts: dict[str, int] = {}
    for entity in drawn.entities:
        key = f", {entity.parent}_id INTEGER REFERENCES {entity.parent}({entity.parent}_id)" if entity.parent else ""
        columns = [f"{c} TEXT" for c in entity.texts] + [f"{c} INTEGER" for c in entity.numbers]
        connection.execute(
            f"CREATE TABLE {entity.name} ({entity.name}_id INTEGER PRIMARY KEY, {', '.join(columns)}{key})"
        )
        cells = [drawn.values[entity.name, column] for column in (*entity.texts, *entity.numbers)]
        counts[entity.name] = len(cells[0])
        if entity.parent:  # some rows of the parent are pointed to by none
            cells.append([rng.randint(1, max(1, counts[entity.parent] - 2)) for _ in cells[0]])
        for number, row in enumerate(zip(*cells, strict=True), 1):
            connection.execute(f"INSERT INTO {entity.name} VALUES ({', '.join('?' * (len(row) + 1))})", (number, *row))
    connection.commit()
    connection.close()


# Questions ------------------------------------------------------------------------------------------------


def _pick(drawn: Drawn, rng: random.Random) -> Entity:
    return rng.choice(drawn.entities)


def _pair(drawn: Drawn, rng: random.Random) -> tuple[Entity, Entity]:
    """(a table, the one that it points to)."""
    child = rng.choice([entity for entity in drawn.entities if entity.parent])
    return child, next(entity for entity in drawn.entities if entity.name == child.parent)


def _value(drawn: Drawn, entity: Entity, column: str, rng: random.Random) -> str | int:
    return rng.choice(drawn.values[entity.name, column])


def _list(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    c = rng.choice((*e.texts, *e.numbers))
    words = rng.choice((f"List the {c} of all {e.plural}.", f"What is the {c} of every {e.name}?"))
    return words, f"SELECT {c} FROM {e.name}"


def _count(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    words = rng.choice(
        (f"How many {e.plural} are there?", f"Count the {e.plural}.", f"What is the number of {e.plural}?")
    )
    return words, f"SELECT count(*) FROM {e.name}"


def _equal(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    by, shown = rng.choice(e.texts), rng.choice((*e.texts, *e.numbers))
    v = _value(drawn, e, by, rng)
    words = rng.choice(
        (f"Show the {shown} of {e.plural} whose {by} is {v}.", f"What is the {shown} of {e.plural} with {by} {v}?")
    )
    return words, f"SELECT {shown} FROM {e.name} WHERE {by} = '{v}'"


def _count_equal(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    by = rng.choice(e.texts)
    v = _value(drawn, e, by, rng)
    words = rng.choice((f"How many {e.plural} have {by} {v}?", f"Count the {e.plural} whose {by} is {v}."))
    return words, f"SELECT count(*) FROM {e.name} WHERE {by} = '{v}'"


def _compare(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    n, shown = rng.choice(e.numbers), rng.choice(e.texts)
    v, (sign, more) = _value(drawn, e, n, rng), rng.choice(((">", "above"), ("<", "below")))
    words = rng.choice(
        (
            f"Show the {shown} of {e.plural} with {n} {more} {v}.",
            f"Which {e.plural} have a {n} {more} {v}? Give the {shown}.",
        )
    )
    return words, f"SELECT {shown} FROM {e.name} WHERE {n} {sign} {v}"


def _extreme(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    n, (f, most) = rng.choice(e.numbers), rng.choice((("max", "highest"), ("min", "lowest")))
    words = rng.choice(
        (
            f"Which {e.name} has the {most} {n}? Show the {e.first}.",
            f"Show the {e.first} of the {e.name} with the {most} {n}.",
        )
    )
    return words, f"SELECT {e.first} FROM {e.name} WHERE {n} = (SELECT {f}({n}) FROM {e.name})"


def _aggregate(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    n, (f, word) = (
        rng.choice(e.numbers),
        rng.choice((("avg", "average"), ("sum", "total"), ("max", "largest"), ("min", "smallest"))),
    )
    words = rng.choice((f"What is the {word} {n} of {e.plural}?", f"Find the {word} {n} of all {e.plural}."))
    return words, f"SELECT {f}({n}) FROM {e.name}"


def _group(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    by = rng.choice(e.texts)
    words = rng.choice((f"How many {e.plural} are there for each {by}?", f"Count the {e.plural} by {by}."))
    return words, f"SELECT {by}, count(*) FROM {e.name} GROUP BY {by}"


def _distinct(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    c = rng.choice(e.texts)
    words = rng.choice((f"What are the different {c} values of {e.plural}?", f"List each {c} of {e.plural} once."))
    return words, f"SELECT DISTINCT {c} FROM {e.name}"


def _above_average(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e = _pick(drawn, rng)
    n, (sign, more) = rng.choice(e.numbers), rng.choice(((">", "above"), ("<", "below")))
    words = f"Show the {e.first} of {e.plural} whose {n} is {more} the average."
    return words, f"SELECT {e.first} FROM {e.name} WHERE {n} {sign} (SELECT avg({n}) FROM {e.name})"


def _joined(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e, u = _pair(drawn, rng)
    by, shown = rng.choice(u.texts), rng.choice((*e.texts, *e.numbers))
    v = _value(drawn, u, by, rng)
    words = rng.choice(
        (
            f"Show the {shown} of {e.plural} whose {u.name} has {by} {v}.",
            f"What is the {shown} of {e.plural} of the {u.name} with {by} {v}?",
        )
    )
    join = f"{e.name} JOIN {u.name} ON {e.name}.{u.name}_id = {u.name}.{u.name}_id"
    return words, f"SELECT {e.name}.{shown} FROM {join} WHERE {u.name}.{by} = '{v}'"


def _joined_group(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e, u = _pair(drawn, rng)
    words = rng.choice(
        (
            f"For each {u.name} {u.first}, how many {e.plural} are there?",
            f"Count the {e.plural} of each {u.name} by {u.first}.",
        )
    )
    join = f"{e.name} JOIN {u.name} ON {e.name}.{u.name}_id = {u.name}.{u.name}_id"
    return words, f"SELECT {u.name}.{u.first}, count(*) FROM {join} GROUP BY {u.name}.{u.first}"


def _without(drawn: Drawn, rng: random.Random) -> tuple[str, str]:
    e, u = _pair(drawn, rng)
    words = rng.choice(
        (
            f"Which {u.plural} have no {e.name}? Show the {u.first}.",
            f"Show the {u.first} of {u.plural} without any {e.name}.",
        )
    )
    return words, f"SELECT {u.first} FROM {u.name} WHERE {u.name}_id NOT IN (SELECT {u.name}_id FROM {e.name})"


TEMPLATES: tuple[Callable[[Drawn, random.Random], tuple[str, str]], ...] = (
    _list,
    _count,
    _equal,
    _count_equal,
    _compare,
    _extreme,
    _aggregate,
    _group,
    _distinct,
    _above_average,
    _joined,
    _joined_group,
    _without,
)


def conversations(file: Path) -> Iterator[dict]:
    """The questions of a file as conversations for `luban sft`, in the prompts that `luban sql` gives."""
    from luban.tools.sql.ask import prompt_of
    from luban.tools.sql.database import open_database
    from luban.tools.sql.linking import Linker
    from luban.tools.sql.spider import read_spider

    linkers: dict[Path, Linker] = {}
    for example in read_spider(file):
        if example.database not in linkers:
            with open_database(example.database) as database:
                linkers[example.database] = Linker(database)
        prompt = prompt_of(example.question, linkers[example.database].link(example.question))
        yield {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": example.sql}]}
