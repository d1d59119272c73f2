"""A statement in words, from its syntax tree."""

from __future__ import annotations

from sqlglot import exp

SIGNS = {
    exp.EQ: "is",
    exp.NEQ: "is not",
    exp.GT: "is more than",
    exp.LT: "is less than",
    exp.GTE: "is at least",
    exp.LTE: "is at most",
    exp.Like: "matches the pattern",
}
AGGREGATES = {exp.Sum: "the sum of", exp.Avg: "the average of", exp.Min: "the smallest", exp.Max: "the largest"}
SETS = {exp.Union: "together with", exp.Intersect: "that are also among", exp.Except: "without"}


def explain(tree: exp.Expression, dialect: str) -> str:
    """One or several sentences that say what a statement does; what has no words here stays SQL."""
    return _Words(dialect).statement(tree)


class _Words:
    def __init__(self, dialect: str):
        self.dialect = dialect

    def statement(self, tree: exp.Expression) -> str:
        if isinstance(tree, exp.Insert):
            return self._insert(tree)
        if isinstance(tree, exp.Update):
            sets = ", ".join(f"{self.sql(e.this)} to {self.value(e.expression)}" for e in tree.expressions)
            return f"Sets {sets} in {self._rows(tree)}."
        if isinstance(tree, exp.Delete):
            return f"Deletes {self._rows(tree)}."
        return f"Shows {self.query(tree)}."

    def _insert(self, tree: exp.Insert) -> str:
        target = tree.this.this if isinstance(tree.this, exp.Schema) else tree.this
        if isinstance(tree.expression, exp.Values):
            count = len(tree.expression.expressions)
            return f"Adds {count} {'row' if count == 1 else 'rows'} to {self.sql(target)}."
        return f"Adds to {self.sql(target)} {self.query(tree.expression)}."

    def _rows(self, tree: exp.Expression) -> str:
        """The rows of a table that a change is about."""
        where = tree.args.get("where")
        if where is None:
            return f"every row of {self.sql(tree.this)}"
        return f"the rows of {self.sql(tree.this)} where {self.condition(where.this)}"

    def query(self, tree: exp.Expression) -> str:
        """A query as a noun phrase."""
        if isinstance(tree, exp.SetOperation):
            word = next(words for kind, words in SETS.items() if isinstance(tree, kind))
            return f"{self.query(tree.this)}, {word} {self.query(tree.expression)}"
        if isinstance(tree, exp.Subquery):
            return self.query(tree.this)
        if not isinstance(tree, exp.Select):
            return self.sql(tree)
        return self._select(tree)

    def _select(self, tree: exp.Select) -> str:
        items = _listed([self.item(item) for item in tree.expressions])
        words = f"the different values of {items}" if tree.args.get("distinct") else items
        if source := tree.args.get("from_"):
            words += f" from {self._sources(source.this, tree.args.get('joins') or [])}"
        if where := tree.args.get("where"):
            words += f", of the rows where {self.condition(where.this)}"
        if group := tree.args.get("group"):
            words += f", for each {_listed([self.sql(item) for item in group.expressions])}"
        if having := tree.args.get("having"):
            words += f", of the groups where {self.condition(having.this)}"
        if order := tree.args.get("order"):
            words += f", ordered by {_listed([self._order(item) for item in order.expressions])}"
        if limit := tree.args.get("limit"):
            count = self.sql(limit.expression)
            words += ", only the first" if count == "1" else f", only the first {count}"
        return words

    def _sources(self, first: exp.Expression, joins: list[exp.Expression]) -> str:
        words = self.source(first)
        for join in joins:
            on = join.args.get("on")
            words += f" joined with {self.source(join.this)}"
            words += f" where {self.condition(on)}" if on is not None else ""
        return words

    def source(self, tree: exp.Expression) -> str:
        """A table, or a query in its place."""
        return f"({self.query(tree)})" if isinstance(tree, exp.Subquery) else self.sql(tree)

    def _order(self, item: exp.Expression) -> str:
        down = isinstance(item, exp.Ordered) and item.args.get("desc")
        return f"{self.value(item.this)}, {'largest' if down else 'smallest'} first"

    def item(self, tree: exp.Expression) -> str:
        """What a query shows."""
        if isinstance(tree, exp.Star):
            return "all columns"
        return f"{self.value(tree.this)} as {tree.alias}" if isinstance(tree, exp.Alias) else self.value(tree)

    def value(self, tree: exp.Expression) -> str:
        """A value in words."""
        if isinstance(tree, exp.Count):
            inside = tree.this
            if isinstance(inside, exp.Distinct):
                return f"the number of different {_listed([self.value(e) for e in inside.expressions])}"
            rows = isinstance(inside, exp.Star)
            return "the number of rows" if rows or inside is None else f"the number of {self.sql(inside)}"
        for kind, words in AGGREGATES.items():
            if isinstance(tree, kind):
                return f"{words} {self.value(tree.this)}"
        if isinstance(tree, exp.Subquery):
            return self.query(tree)
        return self.sql(tree)

    def condition(self, tree: exp.Expression) -> str:
        """A condition in words."""
        if isinstance(tree, (exp.And, exp.Or)):
            word = "and" if isinstance(tree, exp.And) else "or"
            return f"{self.condition(tree.this)} {word} {self.condition(tree.expression)}"
        if isinstance(tree, exp.Paren):
            return f"({self.condition(tree.this)})"
        negative = isinstance(tree, exp.Not)
        inside = tree.this if negative else tree
        no = "not " if negative else ""
        if isinstance(inside, exp.Is):
            return f"{self.value(inside.this)} is {'' if negative else 'not '}known"
        if isinstance(inside, exp.Between):
            low, high = inside.args["low"], inside.args["high"]
            return f"{self.value(inside.this)} is {no}between {self.value(low)} and {self.value(high)}"
        if isinstance(inside, exp.In):
            query = inside.args.get("query")
            among = self.query(query) if query else _listed([self.value(e) for e in inside.expressions], "or")
            return f"{self.value(inside.this)} is {no}{'among' if query else 'one of'} {among}"
        if isinstance(inside, exp.Exists):
            return f"there is {'no' if negative else 'a'} row of {self.query(inside.this)}"
        for kind, words in SIGNS.items():
            if type(inside) is kind:
                sentence = f"{self.value(inside.this)} {words} {self.value(inside.expression)}"
                return f"it is not so that {sentence}" if negative else sentence
        return self.sql(tree)

    def sql(self, tree: exp.Expression) -> str:
        """SQL as it is."""
        return tree.sql(dialect=self.dialect)


def _listed(words: list[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"
