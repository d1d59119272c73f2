"""Fields of a conversation other than its text: roles, names and tool calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from luban.corpus.document import Document

FIXED = ("role", "type")  # fields whose values are names of a format, not words of a text


def map_strings(value: Any, change: Callable[[str], str], field: str = "") -> Any:
    """`value` (JSON) with `change` applied to every string in it, except the keys and the values of FIXED fields."""
    if isinstance(value, str):
        return value if field in FIXED else change(value)
    if isinstance(value, Mapping):
        return {key: map_strings(item, change, key) for key, item in value.items()}
    if isinstance(value, list):
        return [map_strings(item, change, field) for item in value]
    return value


def strings_of(value: Any) -> Iterator[str]:
    """Every string in a JSON value, in order, keys excepted."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings_of(part)


def turns(document: Document) -> list[tuple[str, str]]:
    """(role, text) of each message, tool calls and names in the text; of a plain document one pair with the role ''.

    The tools that a conversation may call (`tools` of its meta) stand last, under the role `tools`. Two documents are the
    same for deduplication exactly where this is the same. The identifiers that link a call to its result are generated at
    random, so they are left out.
    """
    if document.messages is None:
        return [("", document.text)]
    found = [(str(message.get("role", "")), _text(message)) for message in document.messages]
    tools = (document.meta or {}).get("tools")
    return [*found, ("tools", json.dumps(tools, ensure_ascii=False, sort_keys=True))] if tools else found


def _text(message: Mapping[str, Any]) -> str:
    """The content, then everything else that the message says, as JSON with sorted keys."""
    rest = {key: value for key, value in _without_ids(message).items() if key not in ("role", "content") and value}
    content = message.get("content")
    content = content if isinstance(content, str) else "" if content is None else json.dumps(content, sort_keys=True)
    return content + ("\n" + json.dumps(rest, ensure_ascii=False, sort_keys=True) if rest else "")


def _without_ids(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_ids(v) for k, v in value.items() if k not in ("tool_call_id", "id")}
    return [_without_ids(item) for item in value] if isinstance(value, list) else value
