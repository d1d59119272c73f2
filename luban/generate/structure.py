"""Structured output: which texts a request may be answered with, as data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from luban.core.errors import ConfigError

Kind = Literal["json_schema", "regex", "grammar"]
WHITESPACE = r"[\x20\x0A\x0D\x09]{0,40}"  # between JSON's tokens; bounded, as small models otherwise write nothing else


@dataclass(frozen=True)
class Structure:
    """A set of texts. Make one with `json_schema`, `json_object`, `choice`, `regex` or `grammar`; tokens are then masked so
    that an answer that ends by itself is one of them (one that `max_tokens` ends is the beginning of one).

    What JSON schemas, regular expressions and grammars may hold is what llguidance reads (https://github.com/guidance-ai/llguidance).
    """

    kind: Kind
    source: str  # the schema as JSON, the expression, or the grammar in Lark's notation

    @classmethod
    def json_schema(cls, schema: str | bool | Mapping[str, Any]) -> Structure:
        """JSON that a schema allows. Raises ConfigError for what is no schema's JSON."""
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ConfigError(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(schema, (bool, Mapping)):
            raise ConfigError(f"a JSON schema is an object, {type(schema).__name__} given")
        try:
            return cls("json_schema", json.dumps(schema))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the JSON schema can't be written as JSON: {error}") from None

    @classmethod
    def json_object(cls) -> Structure:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> Structure:
        """Texts that a regular expression matches whole (syntax of Rust's regex crate)."""
        return cls("regex", _text(pattern, "a regular expression"))

    @classmethod
    def choice(cls, options: Iterable[str]) -> Structure:
        """One of these strings. Raises ConfigError where there is none."""
        options = [options] if isinstance(options, str) else list(options)
        if not options or not all(isinstance(option, str) and option for option in options):
            raise ConfigError(f"a choice needs non-empty strings, {options!r} given")
        return cls("grammar", "start: " + " | ".join(json.dumps(option) for option in dict.fromkeys(options)))

    @classmethod
    def grammar(cls, lark: str) -> Structure:
        """Texts that a context-free grammar derives from `start`, in Lark's notation."""
        return cls("grammar", _text(lark, "a grammar"))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{what} is a non-empty string, {value!r} given")
    return value
