"""Templates of a task's fields over a row of data: Jinja, as in lm-evaluation-harness, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from luban.core.errors import ConfigError, DataError


def value_of(template: str, row: Mapping[str, Any]) -> Any:
    """The value of a template over a row.

    A template that is just the name of a field gives its value as it is, one that is a single `{{ expression }}` the value of
    that, of whatever type; anything else is filled in and gives text.

    Raises:
        ConfigError: a template that isn't valid. DataError: one that needs a field which the row lacks.
    """
    if template in row:
        return row[template]
    try:
        return _compiled(template)(dict(row))
    except jinja2.UndefinedError as error:
        known = ", ".join(row)
        raise DataError(
            f"the template {template[:60]!r} needs a field that isn't there: {error} (known: {known})"
        ) from None
    except (TypeError, ValueError, LookupError, ArithmeticError, jinja2.TemplateError) as error:
        raise DataError(f"the template {template[:60]!r} can't be filled: {error}") from None


def text_of(template: str, row: Mapping[str, Any]) -> str:
    """`value_of` as text. Raises DataError where a field holds something else than text or a number."""
    value = value_of(template, row)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"the template {template[:60]!r} must give text, {value!r:.60} given")
    return str(value)


@lru_cache(maxsize=1024)
def _compiled(template: str):
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    try:
        inner = template.strip()
        alone = inner.startswith("{{") and inner.endswith("}}") and "{{" not in inner[2:] and "{%" not in inner
        if alone and inner == template:
            found = environment.compile_expression(inner[2:-2].strip(" -+"), undefined_to_none=False)
            return lambda row: _defined(found(**row))
        return environment.from_string(template).render
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the template {template[:60]!r} is not valid: {error}") from None


def _defined(value: Any) -> Any:
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises UndefinedError with the name
    return value
