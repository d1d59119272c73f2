"""Tools by name, for command lines: calculator, search:INDEX, sql:DATABASE, FILE.py:FUNCTION."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from luban.core.errors import ConfigError, UsageError
from luban.core.protocols import Retriever
from luban.tools.calculator import calculator
from luban.tools.search import search_tool
from luban.tools.tool import Tool, tool_of

KNOWN = "calculator, search:INDEX, sql:DATABASE or FILE.py:FUNCTION"


def open_tools(names: Sequence[str], retriever: Callable[[str], Retriever] | None = None) -> list[Tool]:
    """The tools of a command line; each word may hold several, separated by commas.

    Args:
        retriever: opens the index of search:INDEX.

    Raises:
        UsageError: a name that means nothing, or two tools of one name.
        ConfigError: a file or function that can't be used.
    """
    tools = [_open(name.strip(), retriever) for word in names for name in word.split(",") if name.strip()]
    if len({tool.name for tool in tools}) < len(tools):
        raise UsageError(f"two tools have the same name, {', '.join(tool.name for tool in tools)}: give each once")
    return tools


def _open(name: str, retriever: Callable[[str], Retriever] | None) -> Tool:
    if name == "calculator":
        return calculator()
    kind, colon, rest = name.partition(":")
    if kind == "sql" and rest:
        from luban.tools.sql.tool import database_tool

        return database_tool(Path(rest))
    if kind == "search" and rest and retriever is not None:
        return search_tool(retriever(rest))
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return tool_of(_imported(Path(file), function))
    raise UsageError(f"there is no tool '{name}': give {KNOWN}")


def _imported(file: Path, function: str):
    """A function of a Python file."""
    if not file.is_file():
        raise ConfigError(f"there is no file {file} with a function {function}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{file} can't be imported: {type(error).__name__}: {error}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{file} has no function {function}")
    return found
