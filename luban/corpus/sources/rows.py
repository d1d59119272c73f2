"""Rows of JSON, Parquet and CSV as documents: a text, or a conversation in one of the shapes that data sets have.

A conversation is a list in `messages`, `conversations` or `conversation`, of OpenAI's turns with `role` and `content` or
ShareGPT's with `from` and `value`; or Alpaca's `instruction`, `input` and `output`. `tools`, `id`, `lang`, `quality`, `meta`,
`title`, `url` and `licence` (or `license`) are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from luban.corpus.document import Document, check_messages, conversation_text
from luban.corpus.jsonable import encodable, jsonable
from luban.corpus.licences import all_of
from luban.corpus.sources import SourceContext

TURNS = ("messages", "conversations", "conversation")  # fields that hold a conversation
ALPACA = ("instruction", "output")  # fields that together are one
LICENCES = ("licence", "license", "licenses")
FIELDS = (
    "id",
    "lang",
    "quality",
    "meta",
    "title",
    "url",
    *LICENCES,
    *TURNS,
    "tools",
    *ALPACA,
    "input",
    "system",
)  # besides the text
SPEAKERS = {  # ShareGPT's names for the roles
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class UnusableRow(ValueError):
    """The row is no document: the first argument says what kind of row it is, the second what is in it."""


def has_text(fields: Iterable[str], text_field: str) -> bool:
    """True if rows with these fields can be documents."""
    names = set(fields)
    return text_field in names or (text_field == "text" and (not names.isdisjoint(TURNS) or names >= set(ALPACA)))


def fields_needed(fields: Iterable[str], text_field: str) -> str:
    """The end of an error message about rows with these fields."""
    names = ", ".join(sorted(encodable(str(field)) for field in fields)[:20])
    return f"'{text_field}' or 'messages'{f', only {names}' if names else ''}; --text-field NAME takes another field"


def row_document(row: Any, number: int, where: str, context: SourceContext) -> Document | None:
    """A row as a document; None where it is empty, or unusable, which are counted apart.

    Args:
        number: names the document where the row has no `id`.
        where: the row's place in the source, for messages.
    """
    try:
        document = _document(row, number, context)
    except RecursionError:
        context.tally.reject("rows that are nested too deeply", f"{context.label} {where}")
        return None
    except UnusableRow as error:
        context.tally.reject(error.args[0], f"{context.label} {where}{''.join(error.args[1:])}")
        return None
    if document is None:
        context.tally.add("empty_rows_skipped")
    return document


def _document(row: Any, number: int, context: SourceContext) -> Document | None:
    if not isinstance(row, Mapping):
        raise UnusableRow("rows that are no objects")
    messages = _conversation(row, context.text_field)
    text = row.get(context.text_field)
    if messages is not None:
        text = conversation_text(messages)
    elif text is None and not has_text(row, context.text_field):
        found = ", ".join(sorted(encodable(str(field)) for field in row)[:20])
        raise UnusableRow(f"rows without '{context.text_field}' or 'messages'", f", which has {found or 'no field'}")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    calls = any(message.get("tool_calls") for message in messages or ())
    if text is None or (isinstance(text, str) and not text.strip() and not calls):
        return None
    if not isinstance(text, str):
        raise UnusableRow(f"rows whose '{context.text_field}' is no text")
    own, lang = row.get("id"), row.get("lang")
    name = encodable(str(own)) if isinstance(own, (str, int)) else f"{number:09d}"
    return Document(
        id=f"{context.label}#{name}",
        text=encodable(text),
        source=context.label,
        lang=_language(lang) if isinstance(lang, str) else None,
        quality=_quality(row.get("quality")),
        messages=messages,
        meta=_meta(row, needed=messages is not None),
    )


def _conversation(row: Mapping[str, Any], text_field: str) -> list[dict[str, Any]] | None:
    """The row's conversation, or None where it has none."""
    if isinstance(row.get(text_field), list):
        return _messages(row[text_field])
    if text_field != "text":
        return None
    turns = next((row[name] for name in TURNS if row.get(name) is not None), None)
    if turns is not None:
        return _messages(turns)
    if row.get("text") is None and all(isinstance(row.get(name), str) for name in ALPACA):
        asked = "\n\n".join(part for name in ("instruction", "input") if (part := row.get(name)))
        said = [("system", row.get("system")), ("user", asked), ("assistant", row["output"])]
        return [{"role": role, "content": encodable(content)} for role, content in said if isinstance(content, str)]
    return None


def _messages(value: Any) -> list[dict[str, Any]]:
    """Messages as `check_messages` gives them, from a list or its JSON; other fields that are null go."""
    try:
        turns = json.loads(value) if isinstance(value, str) else value
        turns = list(map(_turn, turns)) if isinstance(turns, list) else turns
        return check_messages(turns)
    except ValueError as error:
        raise UnusableRow("rows with unusable messages", f": {error}") from None


def _turn(turn: Any) -> Any:
    """A turn of OpenAI's shape, from one of ShareGPT's."""
    if not isinstance(turn, Mapping):
        return turn
    if "role" not in turn and "from" in turn:
        speaker = str(turn["from"])
        turn = {"role": SPEAKERS.get(speaker.lower(), speaker), "content": turn.get("value"), **turn}
        turn = {key: item for key, item in turn.items() if key not in ("from", "value")}
    return jsonable({key: item for key, item in turn.items() if item is not None})


def _language(tag: str) -> str:
    """A language tag with its first part in lower case (RFC 5646, section 2.1.1), parts divided by hyphens."""
    first, hyphen, rest = encodable(tag.strip()).replace("_", "-").partition("-")
    return first.lower() + hyphen + rest


def _quality(value: Any) -> float | None:
    """The row's score; of a table of text it is spelt."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _meta(row: Mapping[str, Any], needed: bool) -> dict[str, Any] | None:
    """The row's `meta`, its title, its address, its tools and its licence, the latter always as `licence`.

    Raises:
        UnusableRow: tools are `needed`, since the row is a conversation, and are no list of objects.
    """
    value = row.get("meta")
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = None
    meta = jsonable(value) if isinstance(value, Mapping) else {}
    terms = (holder[name] for holder in (row, meta) for name in LICENCES if name in holder)
    licence = next(filter(None, map(_terms, terms)), None)
    if licence:
        meta = {**{key: item for key, item in meta.items() if key not in LICENCES}, "licence": licence}
    for name in ("title", "url"):
        if isinstance(row.get(name), str):
            meta[name] = encodable(row[name])
    if row.get("tools") and (tools := _tools(row["tools"], needed)):
        meta["tools"] = tools
    return meta or None


def _tools(value: Any, needed: bool) -> list[Any] | None:
    """The tools that a conversation may call, from a list or its JSON; None where it is something else.

    Raises:
        UnusableRow: it is something else and `needed`.
    """
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        value = ...
    if value is None or (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
        return jsonable(value)
    if needed:
        raise UnusableRow("rows with unusable tools", ": tools must be a list of objects, or the JSON of one")
    return None


def _terms(value: Any) -> str:
    """A licence as one SPDX expression; of a list, all apply."""
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return all_of(encodable(name) for name in names if isinstance(name, str))
