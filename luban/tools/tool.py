"""A function that a model may call, described by a JSON schema, and one bounded call of it."""

from __future__ import annotations

import inspect
import json
import re
import threading
import time
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luban.core.errors import ConfigError

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")  # as OpenAI's API takes names
SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A function with what a model has to know of it.

    Raises:
        ConfigError: a name that the API's formats don't take, or parameters that are no schema of an object.
    """

    name: str  # letters, digits, _ and -
    description: str  # what it does, for the model
    parameters: Mapping[str, Any]  # JSON schema of its keyword arguments, an object
    function: Callable[..., Any]  # takes the arguments by name; a result that is no string is written as JSON

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"a tool's name has 1 to 64 letters, digits, _ or -, {self.name!r} given")
        if self.parameters.get("type") != "object":
            raise ConfigError(f"the parameters of the tool {self.name} must be a JSON schema of type object")

    def definition(self) -> dict[str, Any]:
        """As chat templates and OpenAI's API have it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


def tool_of(function: Callable[..., Any]) -> Tool:
    """A Tool of a Python function: its name, the first paragraph of its docstring, a schema of its annotations.

    Raises:
        ConfigError: a parameter without an annotation, or with one that has no schema (str, int, float, bool, list[…],
            dict, Literal[…] and unions with None have one).
    """
    name = getattr(function, "__name__", "")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters.values()
    except (NameError, TypeError, ValueError) as error:
        raise ConfigError(f"the signature of the tool {name or function!r} can't be read: {error}") from None
    properties, required = {}, []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(f"the tool {name} takes {parameter}, but a tool's arguments are given by name")
        properties[parameter.name] = _schema(hints.get(parameter.name), f"{name}({parameter.name})")
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    about = (inspect.getdoc(function) or "").split("\n\n")[0]
    return Tool(name=name, description=" ".join(about.split()), parameters=schema, function=function)


def _schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of an annotation."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint in SCALARS:
        return {"type": SCALARS[hint]}
    if hint is dict or origin is dict:
        return {"type": "object"}
    if hint is list:
        return {"type": "array"}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], where)}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [{"type": "null"} if a is type(None) else _schema(a, where) for a in arguments]}
    raise ConfigError(f"the parameter {where} needs an annotation such as str, int, float, bool or list[str]")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call came to."""

    text: str  # the result, or the error in words, cut to the limit
    failed: bool  # whether the tool raised, hung or doesn't exist
    hung: bool = False  # whether it is still running
    cut: bool = False  # whether the result was longer
    seconds: float = 0.0  # that the call took


def call_tool(tool: Tool, arguments: str, *, seconds: float, limit: int) -> Outcome:
    """Call a tool with arguments in JSON; whatever it does, an Outcome comes back in about `seconds`.

    The function runs in a thread of its own. Python can't end a thread: one that hangs is left behind and said to hang.

    Args:
        seconds: that it has.
        limit: UTF-8 bytes of the result that are kept.
    """
    try:
        given = json.loads(arguments or "{}")
    except ValueError as error:
        given = error
    if not isinstance(given, dict):
        return Outcome(text=f"error: the arguments of {tool.name} are no JSON object", failed=True)
    found: list[tuple[str, bool]] = []

    def work() -> None:
        try:
            result = tool.function(**given)
            found.append((result if isinstance(result, str) else _as_json(result), False))
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a tool end the tool alone
            found.append((f"error: {tool.name} failed: {type(error).__name__}: {error}", True))

    start = time.monotonic()
    thread = threading.Thread(target=work, name=f"tool {tool.name}", daemon=True)
    thread.start()
    thread.join(seconds)
    took = time.monotonic() - start
    if not found:
        text = f"error: {tool.name} gave no result within {seconds:g} seconds"
        return Outcome(text=text, failed=True, hung=True, seconds=took)
    text, failed = found[0]
    shown = shorten(text, limit)
    return Outcome(text=shown, failed=failed, cut=shown is not text, seconds=took)


def _as_json(result: Any) -> str:
    return json.dumps(result, ensure_ascii=False, default=str)


def shorten(text: str, limit: int) -> str:
    """`text` itself, or as much of it as `limit` UTF-8 bytes hold with a note behind it that says how long it was."""
    size = len(text) if len(text) > 4 * limit else len(text.encode(errors="replace"))
    if size <= limit:
        return text
    kept = text[:limit].encode(errors="replace")[:limit].decode(errors="ignore")
    return f"{kept} [cut: {len(text)} characters, {len(kept)} shown]"
