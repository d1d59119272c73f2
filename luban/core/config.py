"""Dataclass ⇄ TOML ⇄ command line.

A configuration is a frozen dataclass. A recipe is the TOML of one; `base = "other.toml"` derives it from
another. `--section.field value` overrides any field. A field annotated with a `Variant` family is chosen
by `type = "name"`, resolved before anything else reads the field.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import re
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from luban.core.errors import ConfigError, nearest
from luban.core.log import warn
from luban.core.registry import Variant

T = TypeVar("T")
UNSHOWN = {"shown": False}  # metadata of a field that a verb sets itself, which `--help` leaves out


@dataclasses.dataclass(frozen=True)
class Partial(Generic[T]):
    """Some fields of a configuration `of`, as plain data: what is left out is decided later."""

    of: type[T]
    given: dict[str, Any] = dataclasses.field(default_factory=dict)

    def filled(self) -> dict[str, Any]:
        """What is given, with what `of.filled` says to follow from it, where `of` has such a function: for people to read."""
        return getattr(self.of, "filled", dict)(self.given)


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
TRUE, FALSE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


def to_dict(value: Any) -> Any:
    """A configuration as plain data: dataclasses → dicts, variants with their `type`, paths → strings."""
    if isinstance(value, Partial):
        return to_dict(value.given)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": value.registry.name_of(type(value)), **plain} if isinstance(value, Variant) else plain
    if isinstance(value, dict):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_dict(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def without_defaults(value: Any) -> Any:
    """A configuration as plain data without the fields that are at their class's default. `from_dict` gives it back."""
    if not dataclasses.is_dataclass(value) or isinstance(value, (type, Partial)):
        return to_dict(value)
    plain = {
        f.name: without_defaults(item)
        for f in dataclasses.fields(value)
        if (item := getattr(value, f.name)) != _default(f)
    }
    return {"type": value.registry.name_of(type(value)), **plain} if isinstance(value, Variant) else plain


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build `cls` from plain data, strictly.

    Strings are accepted for numbers and booleans, since a command line has nothing else.

    Raises:
        ConfigError: an unknown field (the nearest right one is named), a wrong type, a missing field,
            or a value that the dataclass itself refuses.
    """
    return _convert(cls, data, where)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return _convert(typing.get_args(hint)[0], value, where)
    if origin is Partial:
        return _partial(typing.get_args(hint)[0], value, where)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is Literal:
        options = typing.get_args(hint)
        match = next((o for o in options if o == value or str(o) == str(value)), None)
        if match is None:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, options))}")
        return match
    if isinstance(hint, type) and issubclass(hint, Variant):
        return _build_variant(hint, value, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        return _convert_sequence(hint, value, where)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: a table is needed, {value!r} given")
        item = (typing.get_args(hint) or (str, Any))[1]
        return {key: _convert(item, v, f"{where}.{key}") for key, v in value.items()}
    return _convert_scalar(hint, value, where)


def _partial(cls: type[T], value: Any, where: str) -> Partial[T]:
    if isinstance(value, Partial):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: a table is needed, {value!r} given")
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in value.keys() - names:
        raise ConfigError(f"unknown field '{where}.{key}'{nearest(key, names)}")
    return Partial(cls, value)


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    if type(None) in typing.get_args(hint) and (_is_none(value) or _is_no_variant(options, value)):
        return None
    problems = []
    for option in options:
        try:
            return _convert(option, value, where)
        except ConfigError as error:
            problems.append(error)
    raise problems[0]


def _is_none(value: Any) -> bool:
    return value is None or value in ("none", "None", "null")


def _is_no_variant(options: list[Any], value: Any) -> bool:
    """A table of type none, of variants that have none of this name: it takes away what a recipe has."""
    if not isinstance(value, dict) or value.get("type") != "none":
        return False
    variants = [option for option in options if isinstance(option, type) and issubclass(option, Variant)]
    return bool(variants) and not any("none" in option.registry.entries for option in variants)


def _convert_sequence(hint: Any, value: Any, where: str) -> Any:
    if isinstance(value, str):
        text = value.strip()
        value = (
            _toml_value(text) if text.startswith("[") else [part.strip() for part in text.split(",") if part.strip()]
        )
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where}: a list is needed, {value!r} given")
    args = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise ConfigError(f"{where}: {len(args)} values are needed, {len(value)} given")
        return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    item = args[0] if args else Any
    made = [_convert(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
    return made if (typing.get_origin(hint) or hint) is list else tuple(made)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{text!r} is not a TOML value: {error}") from None


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    wrong = ConfigError(f"{where}: {KINDS.get(hint, hint)} is needed, {value!r} given")
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return hint(value)
    if hint is bool:
        if isinstance(value, str) and value.lower() in TRUE | FALSE:
            return value.lower() in TRUE
        if not isinstance(value, bool):
            raise wrong
        return value
    if hint is int or hint is float:
        number = _number(value)
        if number is None or (hint is int and number != int(number)):
            raise wrong
        return hint(number)
    if hint is str or hint is Path:
        if isinstance(value, (str, Path)):
            return hint(value)
        raise wrong
    raise ConfigError(f"{where}: fields of type {hint} cannot be configured")


def _number(value: Any) -> int | float | None:
    """An int where the text is one (so that none is rounded), else a float, else nothing."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    for kind in (int, float):
        try:
            return kind(value) if isinstance(value, str) else None
        except ValueError:
            continue
    return None


def _build(cls: type, value: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{where or cls.__name__}: a table is needed, {value!r} given")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    made = {}
    for key, item in value.items():
        path = f"{where}.{key}" if where else key
        if key not in fields:
            moved = getattr(cls, "MOVED", {}).get(key)
            raise ConfigError(f"unknown field '{path}'{f': it is now {moved}' if moved else nearest(key, fields)}")
        made[key] = _convert(hints[key], _with_default_type(fields[key], item), path)
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in made:
            raise ConfigError(f"missing field '{where}.{name}'" if where else f"missing field '{name}'")
    try:
        return cls(**made)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def _with_default_type(field: dataclasses.Field, value: Any) -> Any:
    """A variant's table without `type` changes the default variant's fields."""
    default = _default(field)
    if isinstance(default, Variant) and isinstance(value, dict) and "type" not in value:
        return {**to_dict(default), **value}
    return value


def _build_variant(family: type[Variant], value: Any, where: str) -> Any:
    if isinstance(value, family):
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict) or "type" not in value:
        raise ConfigError(f'{where}: choose one with type = "…"{nearest("", family.registry)}')
    chosen = family.registry[value["type"]]
    fields = {key: item for key, item in value.items() if key != "type"}
    if isinstance(value, Inherited):
        fields = _take_over(family, chosen, fields, value.inherited, f"{where}.type {value['type']}")
    return _build(chosen, fields, where)


def _take_over(
    family: type[Variant], chosen: type, fields: dict[str, Any], inherited: frozenset[str], choice: str
) -> dict[str, Any]:
    """`fields` without those inherited from another variant that the chosen one doesn't have; both kinds are said, but for fields
    that all variants share with one meaning and default. One that no variant has stays, to be refused."""
    own = {f.name for f in dataclasses.fields(chosen) if f.init}
    base = dataclasses.fields(family) if dataclasses.is_dataclass(family) else ()
    shared = {f.name: (f.default, f.default_factory) for f in base}
    same = {f.name for f in dataclasses.fields(chosen) if (f.default, f.default_factory) == shared.get(f.name)}
    kept = sorted((inherited & own) - same)
    others = {f.name for variant in family.registry.values() for f in dataclasses.fields(variant)}
    left = sorted((inherited - own) & others)
    words = [f"keeps {', '.join(f'{name} = {fields[name]}' for name in kept)} from the type before"] * bool(kept)
    words += [f"leaves out {', '.join(left)}, which it doesn't have"] * bool(left)
    if words:
        warn(f"{choice} {' and '.join(words)}")
    return {name: item for name, item in fields.items() if name not in left}


def read_toml(path: Path) -> dict[str, Any]:
    """One TOML file as plain data. Raises ConfigError for a file that can't be read or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory, not a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def load_toml(path: Path, shipped: Path | None = None) -> dict[str, Any]:
    """The TOML file as plain data, merged over the chain of `base = "other.toml"` it derives from.

    Args:
        shipped: a folder of recipes, which `base` may name without path and suffix.

    Raises:
        ConfigError: a file that is missing or no TOML, or that derives from itself.
    """
    return _load_chain(path, shipped, ())


def _load_chain(path: Path, shipped: Path | None, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise ConfigError(f"{path} derives from itself by its chain of base")
    data = read_toml(path)
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path}: base must name a recipe, {base!r} given")
    return merge(_load_chain(_base(path, base, shipped), shipped, (*above, path.resolve())), data)


def _base(path: Path, base: str, shipped: Path | None) -> Path:
    """The recipe that `base` in `path` names: a file seen from there, or one that ships."""
    if (path.parent / base).is_file() or shipped is None:
        return path.parent / base
    bare = base.removeprefix("recipes/").removesuffix(".toml")
    if not (shipped / f"{bare}.toml").is_file():
        known = nearest(bare, [recipe.stem for recipe in shipped.glob("*.toml")])
        raise ConfigError(f"{path}: base '{base}' is neither a file beside it nor a recipe that ships{known}")
    return shipped / f"{bare}.toml"


class Inherited(dict[str, Any]):
    """A variant's table whose `type` was changed. `inherited`: fields that were given for the variant before, which the new
    one takes over where it has them."""

    def __init__(self, data: dict[str, Any], inherited: frozenset[str]):
        super().__init__(data)
        self.inherited = inherited


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, table by table. Where `over` changes a `type`, the fields of `base` are `Inherited`; those that `over`
    itself has inherited stay so."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(out.get(key), dict) and isinstance(value, dict)
        out[key] = merge(out[key], value) if both else value
    inherited = base.inherited if isinstance(base, Inherited) else frozenset()
    if "type" in over and over["type"] != base.get("type"):
        inherited |= base.keys()
    taken = over.inherited if isinstance(over, Inherited) else frozenset()
    inherited = (inherited - over.keys() | taken) - {"type"}
    return Inherited(out, inherited) if inherited else out


def override(data: dict[str, Any], assignments: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Apply `section.field` = text pairs from a command line, `…type` first (see `merge`)."""
    for path, text in sorted(assignments, key=lambda pair: not pair[0].endswith(".type")):
        nested: Any = text
        for name in reversed(path.split(".")):
            nested = {name: nested}
        data = merge(data, nested)
    return data


def to_toml(data: dict[str, Any]) -> str:
    """Plain data as TOML text, scalars before tables; None is left out, since TOML has no such value."""
    lines: list[str] = []
    _write_table(data, (), lines)
    return "\n".join(lines).strip() + "\n"


def _write_table(data: dict[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    tables = {key: value for key, value in data.items() if isinstance(value, dict)}
    scalars = {key: value for key, value in data.items() if key not in tables and value is not None}
    if path and (scalars or not tables):
        lines += ["", f"[{'.'.join(path)}]"]
    lines += [f"{_toml_key(key)} = {_toml_text(value)}" for key, value in scalars.items()]
    for key, value in tables.items():
        _write_table(value, (*path, _toml_key(key)), lines)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _toml_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml_text, value))}]"
    if isinstance(value, dict):
        pairs = [f"{_toml_key(key)} = {_toml_text(item)}" for key, item in value.items() if item is not None]
        return f"{{ {', '.join(pairs)} }}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
