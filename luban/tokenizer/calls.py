"""Calls of tools in chat templates, which disagree about how an assistant's calls are handed to them.

OpenAI's API has a call's arguments as JSON text and no content beside it; most templates want the arguments as a table,
some as text, some write the content's `None` as a word and others end an empty content as a turn of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luban.core.errors import DataError
from luban.tokenizer.marks import EVERYWHERE, NONE, Fill, Messages, Mode, fill_marked


def fill_calls(messages: Sequence[Mapping[str, Any]], fill: Fill, prompt: bool) -> tuple[Messages, str]:
    """(the messages in a form that the template takes, the template filled with them).

    Of the forms that it takes with arguments as tables, else as text, the one is chosen that writes less: `None` and
    turns without words are what is written besides.

    Raises:
        DataError: the template takes no form, or leaves calls out, which would train on or answer another conversation.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages, fill(messages, prompt)
    tables = [{**message, **_calls(message)} for message in messages]
    problem: DataError | None = None
    for form in (tables, messages):
        filled: list[tuple[Messages, str]] = []
        for content in (None, ""):
            asked = [{**m, "content": content} if m.get("tool_calls") and not m.get("content") else m for m in form]
            try:
                page = fill(asked, prompt)
                if form is messages or not _prints_tables(page, asked):
                    filled.append((asked, page))
            except DataError as error:
                problem = error
        if filled:
            asked, page = min(filled, key=lambda pair: len(pair[1]))
            _require_calls(page, asked, fill, prompt)
            return asked, page
    raise problem or DataError("the chat template writes the arguments of calls as Python prints tables, not as JSON")


def _calls(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message's calls with their arguments as tables."""
    calls = message.get("tool_calls")
    return {"tool_calls": [_with_table(call) for call in calls]} if calls else {}


def _with_table(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _prints_tables(page: str, messages: Messages) -> bool:
    """True if a template that expects arguments as text has printed a Python dict."""
    functions = [call["function"] for m in messages for call in m.get("tool_calls") or () if "function" in call]
    tables = [function["arguments"] for function in functions if isinstance(function.get("arguments"), dict)]
    return any(table and str(table) in page for table in tables)


def _require_calls(page: str, messages: Messages, fill: Fill, prompt: bool) -> None:
    """Raise DataError where marks in the calls of a turn leave the page as it is and are in no place of it."""
    for turn, message in enumerate(messages):
        if message.get("tool_calls"):
            modes = [Mode(EVERYWHERE[2:], starts=True) if i == turn else NONE for i in range(len(messages))]
            found = fill_marked(messages, fill, modes, prompt)
            if found is not None and found[0] == page and not found[1]:
                raise DataError(
                    f"turn {turn + 1} of the conversation, the assistant's: the chat template leaves out its tool "
                    "calls: use a model whose template has them (luban sft and luban tokenizer import take --chat-template FILE)"
                )
