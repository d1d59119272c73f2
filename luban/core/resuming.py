"""Which configuration fields may change when an artifact is resumed, and what to do with each.

A field without a mark defines the result: another value is refused. `Operational[…]`, `Numerical[…]` and `Extensible[…]`
mark the others where they are declared.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from luban.core.config import Partial, to_dict
from luban.core.errors import ArtifactError

if TYPE_CHECKING:
    from luban.core.artifact import Manifest

T = TypeVar("T")


class Mark(enum.Enum):
    """Effect of another value of a field on the result."""

    OPERATIONAL = "nothing: logging, paths, threads, what is kept on disk"
    NUMERICAL = "rounding, and what depends on it"
    LENGTH = "how long training goes on"


Operational = Annotated[T, Mark.OPERATIONAL]
Numerical = Annotated[T, Mark.NUMERICAL]
Extensible = Annotated[T, Mark.LENGTH]


def marks(config: Any, prefix: str = "") -> dict[str, Mark]:
    """The marked fields of a configuration dataclass, nested ones by their dotted path; rows of a list by their number."""
    found: dict[str, Mark] = {}
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        path, value = f"{prefix}{field.name}", getattr(config, field.name)
        mark = next((m for m in getattr(hints[field.name], "__metadata__", ()) if isinstance(m, Mark)), None)
        if mark is not None:
            found[path] = mark
            continue
        rows = enumerate(value) if isinstance(value, tuple) else ()
        for name, part in ((path, value), *((f"{path}.{i}", row) for i, row in rows)):
            if dataclasses.is_dataclass(part) and not isinstance(part, Partial):
                found |= marks(part, f"{name}.")
    return found


def split_config(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A configuration dataclass as two tables of plain data: what defines the result, and the operational and numerical
    settings."""
    defining, settings = to_dict(config), {}
    for path, mark in marks(config).items():
        if mark is not Mark.LENGTH:
            *sections, name = path.split(".")
            source, target = defining, settings
            for section in sections:
                source = source[int(section) if isinstance(source, list) else section]
                target = target.setdefault(section, {})
            target[name] = source.pop(name)
    return {name: value for name, value in defining.items() if value != {}}, settings


def differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of every field in which two tables of plain data differ, in order; the type that a
    table's other fields depend on comes first."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys(), key=lambda key: (key != "type", key)):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new


def require_resumable(found: Manifest, wanted: Manifest, path: Path, extensible: Collection[str], remedy: str) -> None:
    """Raise ArtifactError unless the artifact `found` at `path` can be resumed, or extended, as the one `wanted`.

    Args:
        extensible: dotted paths in `config` that may differ.
        remedy: what else can be done, for the message.
    """
    what = f"{path} is {'an' if found.status == 'unfinished' else 'a'} {found.status} {found.kind}"
    for name in ("kind", "format", "seed", "config"):
        changes = differences(getattr(found, name), getattr(wanted, name), name)
        for field, old, new in changes:
            if field.removeprefix("config.") not in extensible:
                raise ArtifactError(f"{what} of another configuration ({field} was {old!r}, now {new!r}): {remedy}")
    old, new = (sorted((p.role, p.content_hash) for p in m.parents) for m in (found, wanted))
    if old != new:
        old, new = (", ".join(f"{p.role} {p.name} {p.content_hash[:12]}" for p in m.parents) for m in (found, wanted))
        raise ArtifactError(f"{what} made from other parents ({old}; now {new}): {remedy}")
