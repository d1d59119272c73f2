"""One document on its way through a corpus build."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from luban.tokenizer.special import ROLES, unknown_role


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text with its name and provenance."""

    id: str  # the same on every machine; unique once the corpus is written (luban.corpus.unique)
    text: str  # the text; of a conversation, its messages' contents joined by line ends
    source: str  # the source's label
    lang: str | None = None  # language code, where known
    quality: float | None = None  # score of a quality step, where one ran
    messages: list[dict[str, Any]] | None = None  # a conversation: [{"role", "content"}, …], calls of tools among them
    meta: dict[str, Any] | None = None  # whatever the source knows
    split: str | None = None  # "train" or "heldout" where the source decides; else the hash of the id does

    def contents(self) -> Iterator[str]:
        """The texts that a tokenizer will see."""
        if self.messages is None:
            yield self.text
        else:
            yield from (message["content"] for message in self.messages if message["content"] is not None)

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """The tools that a conversation may call, as its row describes them."""
        return (self.meta or {}).get("tools")

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def conversation_text(messages: list[dict[str, Any]]) -> str:
    """The `text` of a conversation's document: what is said in it, without calls of tools."""
    return "\n".join(message["content"] for message in messages if message["content"] is not None)


def rewrite_messages(messages: list[dict[str, Any]], rewrite: Callable[[str], str]) -> list[dict[str, Any]]:
    """The messages with their contents rewritten; a turn without one, which calls tools, stays as it is."""
    return [m if m["content"] is None else {**m, "content": rewrite(m["content"])} for m in messages]


def check_messages(value: Any) -> list[dict[str, Any]]:
    """`value` as a list of messages, from a list or its JSON.

    A content may be a list of `{"type": "text", "text": …}`, which are joined, and is None where an assistant only calls
    tools. `weight` 0 says that an answer isn't trained on, as in OpenAI's fine-tuning files.

    Raises:
        ValueError: it is no non-empty list of {"role": str, "content": str}, a role is not in ROLES, or a
            weight is neither 0 nor 1.
    """
    value = json.loads(value) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise ValueError('messages must be a non-empty list of {"role": …, "content": …}')
    return [_check_message(message) for message in value]


def _check_message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError('a message must be {"role": …, "content": …}')
    if message["role"] not in ROLES:
        raise ValueError(unknown_role(message["role"]))
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) < len(parts):
            raise ValueError("a message's content holds parts that are no text")
        content = "".join(texts)
    if calls is not None and not (isinstance(calls, list) and all(map(_is_call, calls))):
        raise ValueError('tool_calls must be a list of {"function": {"name": …, "arguments": …}}')
    if not isinstance(content, str) and not (content is None and calls and message["role"] == "assistant"):
        raise ValueError(f"a message of role {message['role']} has no content")
    weight = message.get("weight")
    if weight not in (None, 0, 1) and weight == weight:  # NaN is a table's way to say that there is none
        raise ValueError(f"a message's weight is 0 or 1, {weight!r} given")
    return {**message, "content": content}


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
