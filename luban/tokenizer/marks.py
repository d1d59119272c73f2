"""Marks in the strings of messages, which show where a chat template puts whose words.

A template may look at its strings (whether they are empty, whether they hold `</think>`, whether two messages are the
same), so that marks can change what it writes. Marks are only believed where the text without them is the same as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from luban.core.errors import DataError

Messages = Sequence[Mapping[str, Any]]
Fill = Callable[[Messages, bool], str]  # (messages, whether a generation prompt follows) → the filled template

MARK, DIGIT = "\udcf3", 0xDD00  # a mark is MARK and two digits to base 256: lone surrogates, which no text has
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # where published templates look for an answer's reasoning


@dataclass(frozen=True)
class Mark:
    """An end of a string of a message."""

    turn: int  # index of the message
    field: str  # "content", "thought" or "call"
    empty: bool = False  # whether the string holds nothing but white space


@dataclass(frozen=True)
class Mode:
    """Which strings of a message get marks."""

    fields: tuple[str, ...]
    starts: bool = False  # at their starts too, not only at their ends
    empty: bool = False  # in empty contents too, where the message calls no tool


EVERYWHERE = ("content", "thought", "call")
FULL, NONE = Mode(EVERYWHERE, starts=True, empty=True), Mode(())
MODES = (FULL, Mode(EVERYWHERE, starts=True), Mode(EVERYWHERE), Mode(("content",)))


@dataclass(frozen=True)
class Place:
    """A mark in a filled template."""

    mark: Mark
    number: int  # which mark it is
    position: int  # in the text without marks


class Writer:
    """Puts marks into messages, each by its mode."""

    def __init__(self, modes: Sequence[Mode]):
        self.modes = modes
        self.marks: list[Mark] = []

    def write(self, messages: Messages) -> list[dict[str, Any]]:
        """The messages with marks."""
        return [self._message(turn, message) for turn, message in enumerate(messages)]

    def _message(self, turn: int, message: Mapping[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        marked["content"] = self._strings(message.get("content"), Mark(turn, "content"), only="text")
        for name in THOUGHTS:
            if message.get(name):
                marked[name] = self._strings(message[name], Mark(turn, "thought"))
        if calls := message.get("tool_calls"):
            marked["content"] = marked["content"] if text_of(message.get("content")).strip() else message.get("content")
            marked["tool_calls"] = [self._call(call, Mark(turn, "call")) for call in calls]
        return marked

    def _call(self, call: Any, mark: Mark) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(call["function"], mark)}
        parts = ("name", "arguments")
        return {key: self._strings(value, mark) if key in parts else value for key, value in call.items()}

    def _strings(self, value: Any, mark: Mark, only: str | None = None) -> Any:
        """`value` with marks in its strings; of the tables in it only the values under the key `only`."""
        if isinstance(value, str):
            return self._string(value, mark)
        if isinstance(value, list):
            return [self._strings(item, mark, only) for item in value]
        if isinstance(value, Mapping):
            return {
                key: self._strings(item, mark, only) if only in (None, key) else item for key, item in value.items()
            }
        return value

    def _string(self, text: str, mark: Mark) -> str:
        mode = self.modes[mark.turn]
        if mark.field not in mode.fields:
            return text
        body = text.strip()
        if not body:
            empty = mode.empty and mark.field == "content"
            return self._next(replace(mark, empty=True)) + text if empty else text
        lead = text[: len(text) - len(text.lstrip())]
        trail = text[len(text.rstrip()) :]
        start = self._next(mark) if mode.starts else ""
        return f"{lead}{start}{body}{self._next(mark)}{trail}"

    def _next(self, mark: Mark) -> str:
        number = len(self.marks)
        if number >= 1 << 16:
            raise DataError("a conversation of more than 30,000 strings has no loss mask: cut it into several")
        self.marks.append(mark)
        return MARK + chr(DIGIT + number // 256) + chr(DIGIT + number % 256)


def read(marked: str, marks: Sequence[Mark]) -> tuple[str, list[Place]] | None:
    """A filled template without its marks, and where they were, in order; None where one was cut into pieces."""
    pieces = marked.split(MARK)
    text, places, length = [pieces[0]], [], len(pieces[0])
    for piece in pieces[1:]:
        digits = [ord(char) - DIGIT for char in piece[:2]]
        number = digits[0] * 256 + digits[1] if len(digits) == 2 else -1
        if not 0 <= number < len(marks):
            return None
        places.append(Place(marks[number], number, length))
        text.append(piece[2:])
        length += len(piece) - 2
    return "".join(text), places


@dataclass(frozen=True)
class Marked:
    """Where messages' words came to stand in a page."""

    modes: list[Mode]  # of each message
    places: list[Place]

    def again(self, messages: Messages, fill: Fill, prompt: bool) -> tuple[str, list[Place]] | None:
        """The template filled with the first messages, marked the same way; None where it refuses them."""
        return fill_marked(messages, fill, self.modes, prompt)


def fill_marked(messages: Messages, fill: Fill, modes: Sequence[Mode], prompt: bool) -> tuple[str, list[Place]] | None:
    """The template filled with marked messages, read; None where it refuses them."""
    writer = Writer(modes)
    try:
        return read(fill(writer.write(messages), prompt), writer.marks)
    except DataError:
        return None


def find(page: str, messages: Messages, fill: Fill, prompt: bool) -> Marked:
    """Where the words of messages stand in `page`, by as many marks as leave it as it is.

    Args:
        page: the template filled with `messages`, with a generation prompt where `prompt` says so.
    """

    def places_by(modes: Sequence[Mode]) -> list[Place] | None:
        found = fill_marked(messages, fill, modes, prompt)
        return found[1] if found is not None and found[0] == page else None

    count = len(messages)
    places = places_by([FULL] * count)
    if places is not None:
        return Marked([FULL] * count, places)
    chosen = []
    for turn in range(count):  # each message has the first mode that shows its place and changes nothing
        tried = [(mode, places_by([mode if i == turn else NONE for i in range(count)])) for mode in MODES]
        unchanged = [(mode, places) for mode, places in tried if places is not None]
        shown = [mode for mode, places in unchanged if places]
        chosen.append(next(iter(shown or [mode for mode, _ in unchanged]), NONE))
    return Marked(chosen, places_by(chosen) or []) if any(mode.fields for mode in chosen) else Marked(chosen, [])


def text_of(content: Any) -> str:
    """The words of a message's content, which is a string, a list of parts, or nothing."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
