"""A question in words → a statement: schema linking, one prompt, decoding held to the schema's grammar."""

from __future__ import annotations

from dataclasses import dataclass, replace

from luban.core.errors import DataError
from luban.generate.cache import PromptTooLong
from luban.generate.sampling import Sampling
from luban.serve.engine import Engine
from luban.tools.sql.database import Database
from luban.tools.sql.grammar import structure
from luban.tools.sql.linking import Linked, Linker
from luban.tools.sql.schema import Schema, Table, quoted

TABLES = 6  # that a prompt names, fewer where the context is short
MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Written:
    """What a model wrote for a question."""

    sql: str
    prompt: str  # that it was given
    linked: Linked


def prompt_of(question: str, linked: Linked) -> str:
    """The text that a model reads: tables with columns, kinds and keys, values that the question names, the question.

    Training data for such models is made by this function too.
    """
    lines = [_line(table, linked.schema) for table in linked.schema.tables]
    named = "; ".join(f"{quoted(v.table)}.{quoted(v.column)} = {_literal(v.text)}" for v in linked.values)
    values = [f"Values: {named}"] if named else []
    return "\n".join(["Tables:", *lines, *values, f"Question: {question.strip()}"])


def _line(table: Table, schema: Schema) -> str:
    keys = {key.column.lower(): key for key in schema.keys if key.table.lower() == table.name.lower()}
    columns = []
    for column in table.columns:
        key = keys.get(column.name.lower())
        target = f" -> {quoted(key.other)}.{quoted(key.other_column)}" if key else ""
        columns.append(f"{quoted(column.name)} {column.kind}{target}")
    return f"{quoted(table.name)}({', '.join(columns)})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


class SQLWriter:
    """Writes statements for one database with one model.

    Args:
        changes: whether INSERT, UPDATE and DELETE may be written too.
        constrained: hold the text to the grammar; without, whatever the model writes up to a line end is taken.
    """

    def __init__(self, engine: Engine, database: Database, *, changes: bool = False, constrained: bool = True):
        self.engine, self.database = engine, database
        self.changes, self.constrained = changes, constrained
        self.linker = Linker(database, tables=TABLES)
        tokenizer = engine.model.need_tokenizer()
        self.chat = tokenizer.chat_template is not None

    def write(self, question: str, sampling: Sampling | None = None) -> Written:
        """The model's statement for a question; greedy unless `sampling` says otherwise.

        Raises:
            DataError: an empty question, one for which the context is too short, or a statement that isn't finished
                after `max_tokens`.
        """
        if not question.strip():
            raise DataError("the question is empty")
        linked, prompt = self._fitting(question)
        sampling = sampling or Sampling(max_tokens=MAX_TOKENS, temperature=0)
        sampling = replace(sampling, n=1, **self._held(linked))
        asked = [{"role": "user", "content": prompt}] if self.chat else f"{prompt}\nSQL: "
        choice = self.engine.generate(asked, sampling)[0].choices[0]
        if self.constrained and choice.finish_reason == "length":
            raise DataError(
                f"the model's statement is not finished after {sampling.max_tokens} tokens: {choice.text[:200]}…"
            )
        return Written(sql=choice.text.strip(), prompt=prompt, linked=linked)

    def _held(self, linked: Linked) -> dict:
        if self.constrained:
            return {"structure": structure(linked.schema, changes=self.changes)}
        return {"structure": None, "stop": ("\n",)}

    def _fitting(self, question: str) -> tuple[Linked, str]:
        """What the question is about, and a prompt that leaves the context enough tokens for the answer."""
        linked = self.linker.link(question)
        count = len(linked.schema.tables)
        while True:
            prompt = prompt_of(question, linked)
            try:
                self.engine.tokens_of([{"role": "user", "content": prompt}] if self.chat else prompt)
                return linked, prompt
            except PromptTooLong:
                count //= 2
                if count == 0:
                    raise
                names = [table.name for table in linked.schema.tables[:count]]
                shown = {name.lower() for name in names}
                values = tuple(value for value in linked.values if value.table.lower() in shown)
                linked = Linked(schema=linked.schema.only(names), values=values)
