"""Flags from environment variables."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from luban.core.arguments import parse
from luban.core.environment import flags_from_environment, variable
from luban.core.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Of a verb."""

    port: int = 8000  # a number
    key: str | None = None  # a word
    names: tuple[str, ...] = ()  # several
    loud: bool = False  # a switch
    share: float | None = None  # a part
    mode: Literal["slow", "fast"] = "slow"  # one of two


def read(argv, **environment):
    return parse(Arguments, flags_from_environment(Arguments, argv, "X", environment), verb="x", about="x")


def test_variables_stand_for_flags_and_the_command_line_wins():
    assert read([], X_PORT="9", X_KEY="a b", X_NAMES="p 'q r'", X_LOUD="true") == Arguments(
        port=9, key="a b", names=("p", "q r"), loud=True
    )
    assert read(["--port", "7", "--names", "z"], X_PORT="9", X_NAMES="p").names == ("z",)
    assert read(["--port=7"], X_PORT="9").port == 7
    assert read([], X_LOUD="0") == read([], Y_PORT="9") == Arguments()


def test_a_value_that_cannot_be_is_refused():
    with pytest.raises(UsageError, match="X_LOUD must be true or false"):
        read([], X_LOUD="maybe")
    with pytest.raises(UsageError, match="X_PORT must be a whole number, 'many' given"):
        read([], X_PORT="many")
    with pytest.raises(UsageError, match="X_SHARE must be a number, 'half' given"):
        read([], X_SHARE="half")
    with pytest.raises(UsageError, match="X_MODE must be one of slow, fast, 'other' given"):
        read([], X_MODE="other")


def test_a_variable_that_sets_nothing_is_named(capsys):
    read([], X_PROT="9", XPORT="9")
    assert capsys.readouterr().err == "warning: the variable X_PROT sets no flag (did you mean 'X_PORT'?)\n"


def test_every_flag_of_serve_has_its_variable(monkeypatch):
    from luban.cli import serve

    values = {"bool": "true", "int": "3", "float": "1.5"}
    hints = get_type_hints(serve.Arguments)
    for field in fields(serve.Arguments):
        if field.name in ("model", "plan"):
            continue
        kind = str(field.type).removesuffix(" | None")
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ()
        value = choices[-1] if choices else values.get(kind, "word")
        found = flags_from_environment(serve.Arguments, [], serve.PREFIX, {variable(serve.PREFIX, field.name): value})
        made = parse(serve.Arguments, ["m", *found], verb="serve", about="x")
        assert getattr(made, field.name) not in (field.default, None), field.name
    found = flags_from_environment(serve.Arguments, [], serve.PREFIX, {"LUBAN_SERVE_PLAN_TENSOR": "3"})
    assert parse(serve.Arguments, ["m", *found], verb="serve", about="x").plan.tensor == 3
