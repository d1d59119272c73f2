"""Flags of a verb from environment variables."""

from __future__ import annotations

import dataclasses
import shlex
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from luban.core.arguments import flags_given
from luban.core.errors import UsageError, nearest
from luban.core.log import warn

TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def variable(prefix: str, field: str) -> str:
    """The variable that stands for a flag: where the prefix is LUBAN_SERVE, LUBAN_SERVE_MAX_QUEUE for `--max-queue` and
    LUBAN_SERVE_PLAN_TENSOR for `--plan.tensor`."""
    return f"{prefix}_{field.replace('.', '_').upper()}"


def flags_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass of arguments with their types, those of a field that is a dataclass itself as "field.its"."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags_of(hints[field.name], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def flags_from_environment(
    cls: type, argv: Sequence[str], prefix: str, environment: Mapping[str, str], positional: Sequence[str] = ()
) -> list[str]:
    """The command line with flags from variables where it doesn't have them itself. Warns of variables with the prefix that
    set no flag (not an error, since orchestrators set variables of their own after a service's name).

    Args:
        cls: dataclass of the verb's arguments.
        argv: the command line.
        prefix: of the variables' names.
        environment: such as os.environ. Values of flags that take several are split like a shell's words.
        positional: fields that are no flags.

    Raises:
        UsageError: a value that the flag can't have; the message names the variable.
    """
    words, known = list(argv), [variable(prefix, name) for name, _ in flags_of(cls) if name not in positional]
    for name in sorted(environment):
        if name.startswith(f"{prefix}_") and name not in known:
            warn(f"the variable {name} sets no flag{nearest(name, known)}")
    given = flags_given(words)
    for name, hint in flags_of(cls):
        value = environment.get(variable(prefix, name))
        if value is None or name in positional or name in given:
            continue
        words += [f"--{name.replace('_', '-')}", *_values(hint, value, variable(prefix, name))]
        if hint is bool:
            words = words if _truth(value, variable(prefix, name)) else words[:-1]
    return words


def _values(hint: Any, value: str, name: str) -> list[str]:
    """The words behind a flag."""
    if hint is bool:
        _truth(value, name)
        return []
    if typing.get_origin(hint) is tuple:
        return shlex.split(value)
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for kind, right in ((int, "a whole number"), (float, "a number")):
        if kind in options and not _reads(kind, value):
            raise UsageError(f"{name} must be {right}, {value!r} given")
    if typing.get_origin(hint) is typing.Literal and value not in typing.get_args(hint):
        raise UsageError(f"{name} must be one of {', '.join(typing.get_args(hint))}, {value!r} given")
    return [value]


def _reads(kind: type, value: str) -> bool:
    """Whether a value is one of a kind."""
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _truth(value: str, name: str) -> bool:
    if value.lower() not in (*TRUE, *FALSE):
        raise UsageError(f"{name} must be true or false, {value!r} given")
    return value.lower() in TRUE
