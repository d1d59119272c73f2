"""Chat templates: Jinja in a sandbox, with `{% generation %}` blocks whose place in the text is kept.

The dialect is the one of Hugging Face chat templates: trimmed blocks, `raise_exception`, `strftime_now`,
`tojson`, loop controls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luban.core.errors import DataError

# Span begins, span ends, no token here. Lone surrogates: no text that came from UTF-8 holds one.
OPEN, CLOSE, GUARD = "\udcf0", "\udcf1", "\udcf2"


class Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: what the model is to write, put between OPEN and CLOSE."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """The block as a call that wraps its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_wrap"), [], [], body).set_lineno(line)

    def _wrap(self, caller: Any) -> str:
        return OPEN + caller() + CLOSE


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def read_template(path: Path) -> str:
    """The chat template in a file.

    Raises:
        DataError: there is none, or it is not Jinja; names the line.
    """
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the chat template {path} can't be read: {error}") from None
    _parse(source)
    return source


def _parse(source: str) -> jinja2.Template:
    try:
        return _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"the chat template is not valid Jinja: {error.message} (line {error.lineno})") from None


def fill(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The template's text for these messages, generation blocks between OPEN and CLOSE.

    Raises:
        DataError: the template is not Jinja, or refuses these messages.
    """
    template = _parse(source)
    try:
        return template.render({**variables, "messages": messages})
    except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from None
