"""Conversations as ShareGPT has them, cleaned and cut at the borders of turns (Chiang et al. 2023, "Vicuna")."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from luban.core.errors import DataError
from luban.core.jsonl import read_rows, write_rows
from luban.tokenizer.chat import render
from luban.tokenizer.tokenizer import Tokenizer

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard", "model"), "assistant"),
    "system": "system",
}
MARKUP = re.compile(r"</?(?:p|br|div|span|pre|code|ul|ol|li|strong|em|table|h[1-6])\b[^>]*>", re.IGNORECASE)
BUTTONS = re.compile(r"^(?:Copy code|\d+ / \d+|Share Prompt)\s*$", re.MULTILINE)  # of the page that was saved
BLOCKS = {"p", "div", "pre", "ul", "ol", "table", "tr", "h1", "h2", "h3", "h4", "h5", "h6"}


class _Plain(HTMLParser):
    """HTML as plain text with code in fences and items behind dashes."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """What stands for the tag."""
        self.parts.append({"pre": "\n```\n", "br": "\n", "li": "\n- "}.get(tag, "\n" if tag in BLOCKS else ""))

    def handle_endtag(self, tag: str) -> None:
        """What ends it."""
        self.parts.append({"pre": "\n```\n"}.get(tag, "\n" if tag in BLOCKS else ""))

    def handle_data(self, data: str) -> None:
        """The text itself."""
        self.parts.append(data)


def clean(text: str) -> str:
    """A turn without HTML and the buttons of the page that it was saved from; text without tags stays as it is."""
    if MARKUP.search(text):
        parser = _Plain()
        parser.feed(text)
        parser.close()
        text = re.sub(r"\n{3,}", "\n\n", "".join(parser.parts))
    return BUTTONS.sub("", text).strip()


def read_sharegpt(file: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(id, turns) of a JSON list or .jsonl file whose rows have `conversations` of `from` and `value`.

    Raises DataError for something else.
    """
    if file.suffix == ".jsonl":
        rows = [row for _, row in read_rows(file)]
    else:
        try:
            rows = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{file} does not exist") from None
        except ValueError as error:
            raise DataError(f"{file} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file} holds no list of conversations")
    for number, row in enumerate(rows):
        turns = row.get("conversations") if isinstance(row, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise DataError(f"{file}, conversation {number + 1}: a list `conversations` of from and value is needed")
        yield str(row.get("id", number)), turns


def as_chat(turns: list[dict[str, Any]]) -> list[dict[str, Any]] | str:
    """Messages that begin with the user's, alternate and end with the assistant's; or why the conversation can't be used."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role, text = ROLES.get(str(turn.get("from", "")).lower()), turn.get("value")
        if role is None or not isinstance(text, str):
            return "unknown role"
        text = clean(text)
        if not text:
            return "empty turn"
        spoken = [message for message in messages if message["role"] != "system"]
        if role == "assistant" and not spoken:
            continue  # an answer whose question was cut off
        if role != "system" and spoken and spoken[-1]["role"] == role:
            return "turns don't alternate"
        weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}
        messages.append({"role": role, "content": text, **weight})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    return messages if any(message["role"] == "assistant" for message in messages) else "no answer"


def cut_turns(
    messages: list[dict[str, Any]], tokenizer: Tokenizer, tokens: int
) -> tuple[list[list[dict[str, Any]]], int]:
    """(pieces of whole exchanges of at most `tokens` tokens with the template around them, exchanges that alone are longer). A
    system's message stands before every piece."""
    system = [message for message in messages if message["role"] == "system"][:1]
    spoken = [message for message in messages if message["role"] != "system"]
    pieces: list[list[dict[str, Any]]] = []
    held: list[dict[str, Any]] = []
    dropped = 0
    for place in range(0, len(spoken), 2):
        pair = spoken[place : place + 2]
        if _size([*system, *held, *pair], tokenizer) <= tokens:
            held += pair
            continue
        if held:
            pieces.append([*system, *held])
        fits = _size([*system, *pair], tokenizer) <= tokens
        held, dropped = (pair if fits else []), dropped + (not fits)
    return [*pieces, *([[*system, *held]] if held else [])], dropped


def _size(messages: list[dict[str, Any]], tokenizer: Tokenizer) -> int:
    return len(render(messages, tokenizer).token_ids)


def convert_sharegpt(file: Path, tokenizer: Tokenizer, tokens: int, out: Path) -> dict[str, int]:
    """Write conversations that `luban sft` trains on; returns how many rows there are, and what was left out and why.

    Raises DataError where nothing is left.
    """
    counts: Counter[str] = Counter()
    rows = []
    for id, turns in read_sharegpt(file):
        counts["conversations"] += 1
        messages = as_chat(turns)
        if isinstance(messages, str):
            counts[f"left out: {messages}"] += 1
            continue
        pieces, dropped = cut_turns(messages, tokenizer, tokens)
        counts["exchanges longer than the context"] += dropped
        rows += [{"id": f"{id}_{n}" if len(pieces) > 1 else id, "messages": piece} for n, piece in enumerate(pieces)]
    if not rows:
        raise DataError(f"no conversation of {file} can be used: {dict(counts)}")
    write_rows(out, rows)
    return {"rows": len(rows), **counts}
