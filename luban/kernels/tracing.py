"""Marks for torch.compile that don't import it: `torch._dynamo` takes longer to import than all of Luban."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_in_graphs(function: F) -> F:
    """Let torch.compile call `function` while it traces and take the result as a constant: the mark that
    `torch.compiler.assume_constant_result` sets."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
