"""How families of models write calls of tools, found by their chat templates: read from text, and as a grammar.

hermes (Hermes 2 Pro, Qwen 2.5 and 3): <tool_call>{"name": …, "arguments": {…}}</tool_call>, any number of them.
llama3 (LLaMA 3.1 and later): the whole answer is {"name": …, "parameters": {…}}, several separated by semicolons.
mistral: [TOOL_CALLS] and a list of {"name": …, "arguments": {…}}, or [TOOL_CALLS]name[ARGS]{…}.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from luban.core.errors import DataError
from luban.generate.structure import WHITESPACE, Structure
from luban.generate.text import overlap
from luban.tokenizer.tokenizer import Tokenizer

LETTERS = string.ascii_letters + string.digits
ID_LENGTH = 9  # Mistral's templates take no other
TEXT = "TEXT: /(?s:.+)/"  # the grammar's rule of any text


@dataclass(frozen=True)
class ToolCall:
    """A call that the model wrote."""

    name: str
    arguments: str  # JSON
    id: str = field(default_factory=lambda: "".join(secrets.choice(LETTERS) for _ in range(ID_LENGTH)))

    def as_openai(self, index: int | None = None) -> dict[str, Any]:
        """In the API's shape; in streams with its number."""
        head = {} if index is None else {"index": index}
        return {
            **head,
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class ToolFormat:
    """One family's way to write calls."""

    opening: ClassVar[tuple[str, ...]] = ()  # what begins a call
    only_at_start: ClassVar[bool] = False  # whether calls are the whole answer
    markers: ClassVar[tuple[str, ...]] = ()  # tokens that stay in the text although they may be special
    arguments: ClassVar[str] = "arguments"  # the key beside "name"
    before, between, after = "", "", ""  # around calls, in the grammar's terms

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def kept(self) -> frozenset[int]:
        """Special tokens that are part of the text."""
        special = self.tokenizer.special
        return frozenset(special[marker] for marker in self.markers if marker in special)

    def read(self, text: str) -> list[ToolCall] | None:
        """The calls of a text that begins with `opening`; None where it holds none that can be read."""
        raise NotImplementedError

    def closed(self, text: str) -> int:
        """Where the first call of the text ends; 0: not before the end of the answer."""
        return 0

    def structure(self, functions: Sequence[tuple[str, dict[str, Any] | None]], *, several: bool) -> Structure:
        """Texts that call one of these functions, (name, schema of the arguments) each, or `several`."""
        rules = self._call_rules(functions)
        return Structure.grammar("\n".join([self._start(several), *rules]))

    def text_or_calls(self, functions: Sequence[tuple[str, dict[str, Any] | None]]) -> Structure:
        """Any text, with or without calls of these functions at its end; their arguments keep their schemas."""
        rules = ["start: TEXT? | calls", self._text(), *self._calls_after_text(), *self._call_rules(functions)]
        return Structure.grammar("\n".join(rules))

    def text_alone(self) -> Structure:
        """Any text in which no call begins."""
        return Structure.grammar(f"start: TEXT?\n{self._text()}")

    def _text(self) -> str:
        """The rule of TEXT, in which no call begins. Special tokens are in no text anyway."""
        mark = self.opening[0]
        return TEXT if mark in self.tokenizer.special else f"{TEXT} & ~/(?s:.*){re.escape(mark)}(?s:.*)/"

    def _calls_after_text(self) -> list[str]:
        """The rules of `calls`, calls behind text that may be empty."""
        mark = self.opening[0]
        if mark in self.tokenizer.special:
            return [f"calls: TEXT? {self._literal(mark)} {self._rest()}"]
        return [f"calls: before {self._rest()}", f"before[lazy]: /(?s:.*){re.escape(mark)}/"]

    def _rest(self) -> str:
        """What follows the first opening mark: `call` with what stands around it, and more calls."""
        raise NotImplementedError

    def _call_rules(self, functions: Sequence[tuple[str, dict[str, Any] | None]]) -> list[str]:
        """Rules of `call`, a call of one of these functions."""
        rules, names = [], []
        for number, (name, schema) in enumerate(functions):
            head = json.dumps(f'{{"name": {json.dumps(name)}, "{self.arguments}": ')
            options = {"x-guidance": {"whitespace_pattern": WHITESPACE, "whitespace_flexible": True}}
            rules += [
                f"args_{number}: %json {json.dumps({**(schema or {'type': 'object'}), **options})}",
                f'call_{number}: {head} args_{number} "}}"',
            ]
            names.append(f"call_{number}")
        return [f"call: {' | '.join(names)}", *rules]

    def _start(self, several: bool) -> str:
        """The first rule: `call` with what stands around it."""
        raise NotImplementedError

    def _literal(self, marker: str) -> str:
        """A marker in a grammar: its special token, or its text."""
        token = self.tokenizer.special.get(marker)
        return json.dumps(marker) if token is None else f"<[{token}]>"


class Hermes(ToolFormat):
    """See the module."""

    opening, markers = ("<tool_call>",), ("<tool_call>", "</tool_call>")

    def read(self, text: str) -> list[ToolCall] | None:
        """Every block; what stands between them is dropped."""
        blocks = re.findall(r"<tool_call>(.*?)(?:</tool_call>|$)", text, re.DOTALL)
        calls = [call for block in blocks for call in _calls(_values(block))]
        return calls if len(calls) >= len(blocks) else None

    def closed(self, text: str) -> int:
        """Behind the first block."""
        end = text.find("</tool_call>")
        return end + len("</tool_call>") if end >= 0 else 0

    def _rest(self) -> str:
        rest = f'"\\n" call "\\n" {self._literal("</tool_call>")}'
        return f'{rest} ("\\n" {self._literal("<tool_call>")} {rest})*'

    def _start(self, several: bool) -> str:
        before, after = self._literal("<tool_call>"), self._literal("</tool_call>")
        block = f'{before} "\\n" call "\\n" {after}'
        return f'start: {block} ("\\n" {block})*' if several else f"start: {block}"


class Llama3(ToolFormat):
    """See the module."""

    opening, markers, only_at_start, arguments = ("<|python_tag|>", "{"), ("<|python_tag|>",), True, "parameters"

    def read(self, text: str) -> list[ToolCall] | None:
        """All objects of the answer."""
        return _calls(_values(text.removeprefix("<|python_tag|>"), separators=" \n;,")) or None

    def _text(self) -> str:
        return rf'{TEXT} & ~/\s*(\{{\s*"name"|<\|python_tag\|>)(?s:.*)/'

    def _calls_after_text(self) -> list[str]:
        return [f'calls: {self._literal("<|python_tag|>")}? call ("; " call)*']

    def _start(self, several: bool) -> str:
        return 'start: call ("; " call)*' if several else "start: call"


class Mistral(ToolFormat):
    """See the module."""

    opening, markers = ("[TOOL_CALLS]",), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")

    def read(self, text: str) -> list[ToolCall] | None:
        """A list, or named calls."""
        calls: list[ToolCall] = []
        for part in filter(None, map(str.strip, text.split("[TOOL_CALLS]"))):
            if part.startswith("["):
                calls += _calls(value for values in _values(part) if isinstance(values, list) for value in values)
            elif named := re.match(r"([\w.-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?\s*(?=\{)", part):
                found = next(_values(part[named.end() :]), None)
                calls += [ToolCall(named[1], json.dumps(found, ensure_ascii=False))] if isinstance(found, dict) else []
        return calls or None

    def _rest(self) -> str:
        return '" "? "[" call (", " call)* "]"'  # templates of some versions write the blank

    def _start(self, several: bool) -> str:
        inner = '"[" call (", " call)* "]"' if several else '"[" call "]"'
        return f"start: {self._literal('[TOOL_CALLS]')} {inner}"


FORMATS: dict[str, type[ToolFormat]] = {"hermes": Hermes, "llama3": Llama3, "mistral": Mistral}


def format_of(tokenizer: Tokenizer) -> ToolFormat:
    """The format that the chat template writes calls in. Raises DataError where it is none of the known."""
    template = tokenizer.chat_template or ""
    if "<tool_call>" in template:
        return Hermes(tokenizer)
    if "[TOOL_CALLS]" in template:
        return Mistral(tokenizer)
    if "<|python_tag|>" in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return Llama3(tokenizer)
    raise DataError(
        f"'tools' need a chat template that writes calls in a known format ({', '.join(FORMATS)}), and this model's doesn't"
    )


def _values(text: str, separators: str = " \n") -> Iterator[Any]:
    """JSON values one after another, up to where something else begins."""
    decoder, at = json.JSONDecoder(), 0
    while True:
        while at < len(text) and text[at] in separators + "\r\t":
            at += 1
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError:
            return
        yield value


def _calls(values: Any) -> list[ToolCall]:
    """Those of some values that are calls."""
    calls = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            continue
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # JSON inside a string, which some models write
            calls.append(ToolCall(value["name"], arguments))
        elif isinstance(arguments, dict):
            calls.append(ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls


class ToolParser:
    """Splits one answer, as it comes, into text and calls. Text is held back where it may begin a call."""

    def __init__(self, form: ToolFormat):
        self.form, self.held, self.started, self.inside = form, "", False, False
        self.calls: list[ToolCall] = []

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """What a piece of the answer adds: (text, calls)."""
        self.held += text
        shown = "" if self.inside else self._outside()
        fresh: list[ToolCall] = []
        while self.inside and (end := self.form.closed(self.held)):
            found = self.form.read(self.held[:end])
            if found is None:
                break
            fresh += found
            self.held, self.inside = self.held[end:].lstrip(), False
            shown += self._outside()
        self.calls += fresh
        return shown, fresh

    def finish(self) -> tuple[str, list[ToolCall]]:
        """The same at the end of the answer."""
        found = self.form.read(self.held) if self.inside else None
        rest, self.held = ("" if found else self.held), ""
        self.calls += found or []
        return rest, found or []

    def _outside(self) -> str:
        """Text up to where a call begins or may begin."""
        if self.form.only_at_start and self.started:
            text, self.held = self.held, ""
            return text
        body = self.held.lstrip()
        if self.form.only_at_start:
            if not body or any(mark.startswith(body) and mark != body for mark in self.form.opening):
                return ""
            self.started = True
            self.inside = body.startswith(self.form.opening)
            return "" if self.inside else self._outside()
        begins = [place for mark in self.form.opening if (place := self.held.find(mark)) >= 0]
        self.inside = bool(begins)
        cut = min(begins) if begins else len(self.held) - max(overlap(self.held, mark) for mark in self.form.opening)
        text, self.held = self.held[:cut], self.held[cut:]
        return text
