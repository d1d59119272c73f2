"""A grammar of SQL over one schema: every text that it derives is a statement whose tables and columns exist, whose joins
follow foreign keys, and whose literals fit their columns.

It holds single tables and joins of two or three along foreign keys; aggregates, DISTINCT, WHERE with comparisons, LIKE,
BETWEEN, IN, NULL and subqueries, GROUP BY with HAVING, ORDER BY, LIMIT, set operations; INSERT, UPDATE and DELETE of one
table. Not: window functions, CASE, arithmetic between columns, subqueries in FROM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

from luban.core.errors import DataError
from luban.generate.structure import Structure
from luban.tools.sql.schema import Column, ForeignKey, Kind, Schema, Table, quoted

MAX_JOINS = 40  # joins that are offered
MAX_COLUMNS = 2000  # in all sources together
# how long lists are at most, so that a model that repeats itself comes to an end
MAX_SELECTED = 16  # columns, and no more than there are
MAX_AGGREGATES = 4
MAX_CONDITIONS = 4  # joined by AND, and as many groups of them by OR
MAX_VALUES = 20  # of IN

STRING = re.compile(r'"(?:[^"\\]|\\.)*"')  # in a rule
PIECE = re.compile(r'"(?:[^"]|"")*"|\w+|\s|[^\w\s]')  # of SQL: a quoted name, a word, a blank, a sign

LITERALS: dict[Kind, str] = {
    "number": r"/-?[0-9]{1,12}(\.[0-9]{1,6})?/",
    "text": r"/'([^'\x00-\x1f\x7f]|''){0,80}'/",
    "date": r"/'[0-9]{4}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8]))'/",
    "boolean": "/true|false/",
}
COMPARED: dict[Kind, tuple[str, ...]] = {
    "number": ("=", "!=", ">", "<", ">=", "<="),
    "text": ("=", "!=", "LIKE", "NOT LIKE"),
    "date": ("=", "!=", ">", "<", ">=", "<="),
    "boolean": ("=",),
}


@dataclass(frozen=True)
class Place:
    """A column as a source spells it."""

    text: str
    column: Column
    table: Table


@dataclass(frozen=True)
class Source:
    """What stands behind FROM, and the columns that it has."""

    text: str
    places: tuple[Place, ...]


def structure(schema: Schema, *, changes: bool = False) -> Structure:
    """The statements over a schema, queries and where asked for changes of rows.

    Raises:
        DataError: more columns than a grammar is made for.
    """
    sources = list(_sources(schema))
    if sum(len(source.places) for source in sources) > MAX_COLUMNS:
        raise DataError(f"a grammar is made for at most {MAX_COLUMNS} columns: link fewer tables")
    rules = [f"LITERAL_{kind.upper()}: {pattern}" for kind, pattern in LITERALS.items()] + [
        "COUNT: /[1-9][0-9]{0,5}/",
        'descending: " DESC" | " ASC" | ""',
    ]
    tables = [table for table in schema.tables if table.columns]
    for number, source in enumerate(sources):
        rules += _source_rules(number, source, schema, sources)
    queries = [f"query_{number}" for number in range(len(sources))] + _set_rules(sources, rules)
    starts = [f"query: {_any(queries)}"]
    written = [table for table in tables if not table.view]
    if changes and written:
        for number, table in enumerate(written):
            rules += _change_rules(number, table, tables.index(table))
        starts.append(f"start: query | {_any(f'change_{number}' for number in range(len(written)))}")
    else:
        starts.append("start: query")
    return Structure.grammar("\n".join([*starts, *(_in_words(rule) for rule in rules)]))


def _in_words(rule: str) -> str:
    """The rule with its texts cut into words, blanks and signs.

    llguidance's lexer takes the longest text that fits and doesn't go back: of two texts of which one goes on where
    another text may follow the other (`a > (SELECT` beside `a`, ` > `), only the longer would be found.
    """
    if rule.partition(":")[0].isupper():  # a terminal
        return rule
    return STRING.sub(lambda found: _cut(json.loads(found[0])), rule)


def _cut(text: str) -> str:
    pieces = [json.dumps(piece, ensure_ascii=False) for piece in PIECE.findall(text)]
    return pieces[0] if len(pieces) == 1 else f"({' '.join(pieces)})" if pieces else '""'


def _sources(schema: Schema) -> Iterator[Source]:
    """Single tables, then joins of two and of three along foreign keys."""
    for table in schema.tables:
        if table.columns:
            yield Source(quoted(table.name), tuple(Place(quoted(c.name), c, table) for c in table.columns))
    keys = [key for key in schema.keys if key.table.lower() != key.other.lower()]
    joins: list[tuple[ForeignKey, ...]] = [(key,) for key in keys]
    for pair in permutations(keys, 2):
        if len({name.lower() for key in pair for name in (key.table, key.other)}) == 3:
            joins.append(pair)
    for join in joins[:MAX_JOINS]:
        yield _joined(schema, join)


def _joined(schema: Schema, keys: Sequence[ForeignKey]) -> Source:
    """Tables joined along keys; columns are spelt with their tables."""
    text, seen = quoted(keys[0].table), [keys[0].table.lower()]
    for key in keys:
        new = key.other if key.table.lower() in seen else key.table
        condition = f"{quoted(key.table)}.{quoted(key.column)} = {quoted(key.other)}.{quoted(key.other_column)}"
        text, seen = f"{text} JOIN {quoted(new)} ON {condition}", [*seen, new.lower()]
    tables = [schema.by_name[name] for name in seen]
    places = (Place(f"{quoted(t.name)}.{quoted(c.name)}", c, t) for t in tables for c in t.columns)
    return Source(text, tuple(places))


def _any(options: Iterable[str]) -> str:
    return " | ".join(options)


def _listed(rule: str, most: int, between: str = ", ", least: int = 1) -> str:
    """A rule from `least` (0 or 1) to `most` times; with 0 a list that goes on from something before it."""
    more = f"({json.dumps(between)} {rule}){{0,{most - least}}}" if most > least else ""
    return f"{rule} {more}" if least else more


def _texts(options: Iterable[str]) -> str:
    return _any(json.dumps(option, ensure_ascii=False) for option in options)


def _source_rules(number: int, source: Source, schema: Schema, sources: Sequence[Source]) -> list[str]:
    """Rules of the queries over one source."""
    s, places = f"_{number}", source.places
    numbers = [place.text for place in places if place.column.kind == "number"]
    sortable = [place.text for place in places if place.column.kind in ("number", "date")]
    start = json.dumps(f" FROM {source.text}", ensure_ascii=False)
    aggregates = ['"count(*)"', f'"count(DISTINCT " col{s} ")"']
    rules = [f"col{s}: {_texts(place.text for place in places)}"]
    if numbers:
        rules.append(f"number{s}: {_texts(numbers)}")
        aggregates.append(f'("sum(" | "avg(") number{s} ")"')
    if sortable:
        rules.append(f"sortable{s}: {_texts(sortable)}")
        aggregates.append(f'("min(" | "max(") sortable{s} ")"')
    rules += [
        f"agg{s}: {_any(aggregates)}",
        f"cols{s}: {_listed(f'col{s}', min(len(places), MAX_SELECTED))}",
        f"aggs{s}: {_listed(f'agg{s}', MAX_AGGREGATES)}",
        f'where{s}: " WHERE " {_listed(f"all{s}", MAX_CONDITIONS, " OR ")}',
        f"all{s}: {_listed(f'one{s}', MAX_CONDITIONS, ' AND ')}",
        f"one{s}: {_any(_conditions(number, source, schema, sources))}",
        f'order{s}: " ORDER BY " col{s} descending (" LIMIT " COUNT)?',
        f'grouped{s}: (" HAVING " having{s})? (" ORDER BY " agg{s} descending (" LIMIT " COUNT)?)?',
        f'having{s}: "count(*)" (" > " | " >= " | " < " | " <= " | " = ") COUNT',
        f"from{s}: {start} where{s}?",
        f'query{s}: "SELECT " (("*" | cols{s}) from{s} (order{s} | " LIMIT " COUNT)? | "DISTINCT " cols{s} from{s} | '
        f"aggs{s} from{s} | {_any(f'group{s}_{i}' for i in range(len(places)))})",
    ]
    for i, place in enumerate(places):
        by = json.dumps(f" GROUP BY {place.text}", ensure_ascii=False)
        name = json.dumps(place.text, ensure_ascii=False)
        rules.append(f"group{s}_{i}: {name} {_listed(f'agg{s}', MAX_AGGREGATES, least=0)} from{s} {by} grouped{s}")
    return rules


def _conditions(number: int, source: Source, schema: Schema, sources: Sequence[Source]) -> Iterator[str]:
    """Alternatives of one condition over a source."""
    by_kind: dict[Kind, list[str]] = {}
    for place in source.places:
        by_kind.setdefault(place.column.kind, []).append(place.text)
    for kind, names in by_kind.items():
        cols, literal = f"({_texts(names)})", f"LITERAL_{kind.upper()}"
        yield f'{cols} " IS NULL"'
        yield f'{cols} " IS NOT NULL"'
        if kind == "other":
            continue
        yield f"{cols} ({_texts(f' {sign} ' for sign in COMPARED[kind])}) {literal}"
        if kind != "boolean":
            yield f'{cols} (" IN (" | " NOT IN (") {_listed(literal, MAX_VALUES)} ")"'
        if kind in ("number", "date"):
            yield f'{cols} " BETWEEN " {literal} " AND " {literal}'
    yield from _subqueries(source, schema, sources)


def _subqueries(source: Source, schema: Schema, sources: Sequence[Source]) -> Iterator[str]:
    """Conditions with a query inside: keys among another table's rows, numbers beside an aggregate of their column."""
    places = {place.text: (place.table.name.lower(), place.column.name.lower()) for place in source.places}
    single = {source.places[0].table.name.lower(): i for i, source in enumerate(sources) if "JOIN" not in source.text}
    for text, (table, column) in places.items():
        for key in schema.keys:
            ends = (key.table.lower(), key.column.lower()), (key.other.lower(), key.other_column.lower())
            for mine, other in (ends, ends[::-1]):
                if mine != (table, column) or other[0] not in single:
                    continue
                target = quoted(schema.by_name[other[0]].column(other[1]).name)
                head = [f"{text} IN (SELECT {target}", f"{text} NOT IN (SELECT {target}"]
                yield f'({_texts(head)}) from_{single[other[0]]} ")"'
    for place in source.places:
        if place.column.kind == "number":
            column, table = quoted(place.column.name), single[place.table.name.lower()]
            heads = (
                f"{place.text} {sign} (SELECT {f}({column})"
                for sign, functions in ((">", ("avg",)), ("<", ("avg",)), ("=", ("max", "min")))
                for f in functions
            )
            yield f'({_texts(heads)}) from_{table} ")"'


def _set_rules(sources: Sequence[Source], rules: list[str]) -> list[str]:
    """Set operations between queries of one column of the same kind; adds their rules and returns their names."""
    names = []
    for kind in ("number", "text", "date"):
        options = []
        for number, source in enumerate(sources):
            columns = [place.text for place in source.places if place.column.kind == kind]
            if columns:
                options.append(f"({_texts(columns)}) from_{number}")
        if options:
            rules.append(f'single_{kind}: "SELECT " ({_any(options)})')
            rules.append(f'set_{kind}: single_{kind} (" UNION " | " INTERSECT " | " EXCEPT ") single_{kind}')
            names.append(f"set_{kind}")
    return names


def _change_rules(number: int, table: Table, source: int) -> list[str]:
    """Rules of INSERT of a whole row, UPDATE of one column and DELETE."""
    name, settable = quoted(table.name), [column for column in table.columns if column.kind != "other"]

    def value(column: Column) -> str:
        if column.kind == "other":
            return '"NULL"'
        literal = "LITERAL_WHOLE" if column.whole else f"LITERAL_{column.kind.upper()}"
        return literal if column.required else f'({literal} | "NULL")'

    names = ", ".join(quoted(column.name) for column in table.columns)
    row = ' ", " '.join(value(column) for column in table.columns)
    options = [f'{json.dumps(f"INSERT INTO {name} ({names}) VALUES (", ensure_ascii=False)} {row} ")"']
    if settable:
        sets = [f"{json.dumps(f'{quoted(c.name)} = ', ensure_ascii=False)} {value(c)}" for c in settable]
        sets += [
            f"{json.dumps(f'{quoted(c.name)} = {quoted(c.name)} {sign} ', ensure_ascii=False)} "
            f"{'LITERAL_WHOLE' if c.whole else 'LITERAL_POSITIVE'}"
            for c in settable
            if c.kind == "number"
            for sign in "+-*"
        ]
        options.append(f"{json.dumps(f'UPDATE {name} SET ', ensure_ascii=False)} ({_any(sets)}) where_{source}?")
    options.append(f"{json.dumps(f'DELETE FROM {name}', ensure_ascii=False)} where_{source}?")
    rules = [f"change_{number}: {_any(options)}"]
    literals = [r"LITERAL_POSITIVE: /[0-9]{1,9}(\.[0-9]{1,4})?/", "LITERAL_WHOLE: /-?[0-9]{1,9}/"]
    return rules if number else [*rules, *literals]
