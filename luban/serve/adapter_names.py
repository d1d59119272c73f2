"""The adapters of a server as its command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from luban.core.errors import UsageError


def by_name(given: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """`--adapter` as given: one directory without a name, or any number of NAME=DIR. Raises UsageError for both."""
    named = dict(each.split("=", 1) for each in given if "=" in each and not Path(each).exists())
    alone = [each for each in given if each.partition("=")[0] not in named]
    if len(alone) > 1 or (alone and named):
        raise UsageError("several adapters need names to be asked for by: --adapter NAME=DIR --adapter OTHER=DIR")
    if len(named) + len(alone) < len(given):
        raise UsageError("two adapters have the same name: give each --adapter NAME=DIR another")
    return (alone[0] if alone else None), named
