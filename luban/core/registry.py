"""Variants are objects: a registry maps a name to `module:attribute`, imported when asked for.

A new algorithm is one file and one registry line; nothing else changes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, ClassVar

from luban.core.errors import ConfigError, nearest


class Registry(Mapping[str, Any]):
    """Names → objects, imported on first use. Entries may only name modules of the package that registers them."""

    def __init__(self, what: str, entries: dict[str, str]):
        self.what = what
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Any:
        if name not in self.entries:
            raise ConfigError(f"unknown {self.what} '{name}'{nearest(name, self.entries)}")
        module, _, attribute = self.entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self):
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def name_of(self, cls: type) -> str:
        """The name under which `cls` is registered."""
        target = f"{cls.__module__}:{cls.__qualname__}"
        for name, entry in self.entries.items():
            if entry == target:
                return name
        raise ConfigError(f"{target} is not a registered {self.what}")


class Variant:
    """Base of configuration dataclasses chosen by `type = "name"` in a recipe.

    A base config sets `registry`; each registered variant is a frozen dataclass that builds the module it configures.
    """

    registry: ClassVar[Registry]
