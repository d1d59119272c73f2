"""Command lines: plain verbs through tyro, recipe verbs through TOML with `--section.field value` overrides.

An error is one line of ours, raised as UsageError; `--help` is tyro's page with our examples.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import textwrap
import tokenize
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from luban.core.config import Partial, from_dict, load_toml, merge, override
from luban.core.errors import ConfigError, UsageError, nearest
from luban.core.registry import Variant

T = TypeVar("T")
OF_NO_KIND = tuple(  # tyro's words for a value that has none of a field's types
    re.compile(rf"Error parsing (?P<flag>\S+): {words}")
    for words in (
        r"no type matching (?P<kinds>\S+) could be instantiated from \[(?P<given>.*?)\]\. Got errors",
        r"invalid literal for (?P<kinds>int)\(\) with base 10: (?P<given>'.*?'|\".*?\")",
        r"could not convert string to (?P<kinds>float): (?P<given>'.*?'|\".*?\")",
    )
)
WANTED = {"int": "a whole number", "float": "a number"}
BORDER = re.compile(r"^\s*[╭╰]|-{10}")  # of a box or with its title, also where the terminal's encoding has ASCII alone
BOX = re.compile(r"[─│╭╮╰╯━┃]+")


def parse(cls: type[T], argv: Sequence[str], *, verb: str, about: str, examples: str = "") -> T:
    """Parse a plain verb's arguments into the dataclass `cls` (positional fields: `tyro.conf.Positional`).

    Raises:
        UsageError: in one line, what was wrong with the command line.
        SystemExit: with 0, after `--help`.
    """
    import tyro

    description = f"{about}\n\nExamples:\n{_indent(examples)}" if examples else about
    _describe_to_tyro(cls)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(
                cls,
                args=list(argv),
                prog=f"luban {verb}",
                description=description,
                config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(printed.getvalue(), verb)) from None


def _describe_to_tyro(cls: type) -> None:
    """Give tyro what it doesn't find by itself: comments that the formatter moved off a field's first line, the names of positional
    fields (it calls them by their types), and that a default of nothing isn't worth printing."""
    import tyro

    hints, comments = typing.get_type_hints(cls, include_extras=True), _comments(cls)
    for field in dataclasses.fields(cls):
        extras = getattr(hints[field.name], "__metadata__", ())
        if any(getattr(each, "help", None) is not None for each in extras):
            continue
        positional = tyro.conf.Positional in extras
        named = not positional or any(getattr(each, "metavar", None) for each in extras)
        empty = field.default in (None, "", ()) or (
            positional and typing.get_origin(extras and hints[field.name].__origin__) is tuple
        )
        shown = tyro.conf.arg(
            help=comments[field.name] or None,
            metavar=None if named else field.name.upper(),
            help_behavior_hint="" if empty else None,
        )
        cls.__annotations__[field.name] = Annotated[hints[field.name], shown]


def flags_given(argv: Sequence[str]) -> dict[str, str]:
    """The flags that stand on a plain verb's command line: field → the flag as it is written, without its value."""
    written = [word.partition("=")[0] for word in argv if word.startswith("--")]
    return {flag.removeprefix("--").replace("-", "_"): flag for flag in written}


def refuse_flags(argv: Sequence[str], fields: Collection[str], why: str) -> None:
    """Refuse flags that would do nothing beside the others of a command line.

    Args:
        fields: names of their fields.
        why: when they do nothing, such as "without --index" or "with --eval".

    Raises:
        UsageError: one of them is given.
    """
    for field, flag in flags_given(argv).items():
        if field in fields:
            raise UsageError(f"{flag} does nothing {why}")


def _indent(text: str) -> str:
    return "\n".join("  " + line.strip() for line in text.strip().splitlines())


def _one_line(box: str, verb: str) -> str:
    body = [line for line in box.splitlines() if not BORDER.search(line)]
    lines = [line for line in (BOX.sub(" ", line).strip() for line in body) if line and "full helptext" not in line]
    text = " ".join(" ".join(lines).split()).partition(" Argument helptext:")[0]
    text = text or "the arguments could not be understood"
    for found in filter(None, (words.search(text) for words in OF_NO_KIND)):
        kinds = found["kinds"].removeprefix("{None}|")
        wanted = WANTED.get(kinds.lower(), kinds)
        return f"{found['flag']}: {wanted} is needed, {found['given']} given (see luban {verb} --help)"
    text = text.removesuffix(f"luban {verb} --help").rstrip()
    return text if "--help" in text else f"{text} (see luban {verb} --help)"


@dataclass(frozen=True, kw_only=True)
class RecipeCall(Generic[T]):
    """A recipe verb's command line, understood."""

    recipe: T  # the configuration, overrides applied
    name: str  # the recipe as it was named
    out: Path  # the run directory
    dry_run: bool = False  # predict only
    processes: int = 1  # to start, one a device
    picture: bool = False  # of the prediction: draw the pipeline's schedule


def parse_recipe(
    cls: type[T],
    argv: Sequence[str],
    *,
    verb: str,
    about: str,
    examples: str,
    shipped: Path,
    adapt: Callable[[dict[str, Any], Collection[str]], dict[str, Any]] | None = None,
    usage: str = "RECIPE.toml --out DIR [--dry-run [--picture]] [--nproc N] [--plan FILE] [--section.field value …]",
) -> RecipeCall[T]:
    """Parse `RECIPE.toml --out DIR [--dry-run [--picture]] [--nproc N] [--plan FILE] [--section.field value …]`.

    `--plan FILE` lays a file of `luban plan` on the recipe: its tables [plan] and [train]. Fields on the command line go before it.

    Args:
        shipped: the folder of recipes that come with Luban, searched by name.
        adapt: makes of the recipe's data and the paths of the fields on the command line the data that those are laid on.

    Raises:
        UsageError, ConfigError: what was wrong and the nearest right name.
    """
    if not argv or "--help" in argv or "-h" in argv:
        _recipe_help(cls, argv, verb, about, examples, shipped, usage)
    names, assignments, flags = _split(argv)
    if len(names) != 1:
        given = f"{len(names)} given: {', '.join(names)}" if names else "none given"
        if names and assignments:
            raise UsageError(
                f"luban {verb} takes one recipe ({given}): values of one field are separated by commas, without spaces"
            )
        raise UsageError(f"luban {verb} takes one recipe ({given}){nearest('', _names(shipped))}")
    if "out" not in flags and "dry-run" not in flags:
        raise UsageError(f"luban {verb} needs --out DIR, the run directory")
    if "picture" in flags and "dry-run" not in flags:
        raise UsageError("--picture draws a pipeline's schedule for --dry-run: give both")
    data = load_toml(find_recipe(names[0], shipped), shipped)
    if adapt is not None:
        data = adapt(data, [path for path, _ in assignments])
    files = [text for path, text in assignments if path == "plan"]
    for file in files:
        data = merge(data, _plan_file(Path(file)))
    recipe = from_dict(cls, override(data, [each for each in assignments if each[0] != "plan"]))
    return RecipeCall(
        recipe=recipe,
        name=names[0],
        out=Path(flags.get("out", ".")),
        dry_run="dry-run" in flags,
        processes=_positive(flags.get("nproc", "1")),
        picture="picture" in flags,
    )


def recipe_type(argv: Sequence[str], shipped: Path, *, default: str) -> str:
    """The `type` that the recipe of a command line states, for verbs whose recipes are of several; without a recipe the
    default."""
    names, _, _ = _split([word for word in argv if word not in ("--help", "-h")])
    if len(names) != 1:
        return default
    return load_toml(find_recipe(names[0], shipped), shipped).get("type", default)


def _plan_file(path: Path) -> dict[str, Any]:
    """The settings of a file that `luban plan --out` wrote."""
    if not path.is_file():
        raise UsageError(f"--plan takes a file that luban plan --out wrote, and there is no {path}")
    data = load_toml(path, path.parent)
    if "plan" not in data:
        raise UsageError(f"{path} has no table [plan]: --plan takes a file that luban plan --out wrote")
    return {name: data[name] for name in ("plan", "train") if name in data}


def run_directory(argv: Sequence[str]) -> Path | None:
    """The run directory that a recipe's command line names; None: it names none."""
    out = _split(argv)[2].get("out")
    return None if out is None else Path(out)


def without_processes(argv: Sequence[str]) -> list[str]:
    """The words of a recipe's command line without `--nproc N`."""
    found, words = [], iter(argv)
    for word in words:
        if word == "--nproc":
            next(words, None)
        elif not word.startswith("--nproc="):
            found.append(word)
    return found


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"--nproc takes a number of processes from 1, {text!r} given")
    return int(text)


def find_recipe(name: str, shipped: Path, kind: str = "recipe") -> Path:
    """A path, or the name of a recipe that ships (with or without `.toml` or a leading `recipes/`); `kind` is what an error calls
    it."""
    if Path(name).is_file():
        return Path(name)
    bare = name.removeprefix("recipes/").removesuffix(".toml")
    if (shipped / f"{bare}.toml").is_file():
        return shipped / f"{bare}.toml"
    raise UsageError(f"no {kind} '{name}': neither a file nor one that ships{nearest(bare, _names(shipped))}")


def _names(shipped: Path) -> list[str]:
    return [path.stem for path in shipped.glob("*.toml")]


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], dict[str, str]]:
    names, assignments, flags = [], [], {}
    words = iter(argv)
    for word in words:
        if not word.startswith("--"):
            names.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_") if key != "dry-run" else key
        if key in ("dry-run", "debug", "picture", "help"):
            flags[key] = "true"
            continue
        if not equals:
            value = next(words, None)
            if value is None:
                raise UsageError(f"--{key} needs a value")
        if key in ("out", "nproc"):
            flags[key] = value
        else:
            assignments.append((key, value))
    return names, assignments, flags


def _recipe_help(
    cls: type, argv: Sequence[str], verb: str, about: str, examples: str, shipped: Path, usage: str
) -> None:
    """Print it, with the values of the recipe and the fields that the command line names, if it does."""
    recipe = None
    named, fields_given, _ = _split([word for word in argv if word not in ("--help", "-h")])
    chosen = [each for each in fields_given if each[0] != "plan"]
    if len(named) == 1:
        data = load_toml(find_recipe(named[0], shipped), shipped)
        for given in ({}, {"init": "MODEL"}):  # recipes that begin with a model are given it on the command line
            for laid_on in (chosen, ()):  # help is given for a wrong field, too
                with contextlib.suppress(ConfigError):
                    recipe = recipe or from_dict(cls, override({**data, **given}, laid_on))
    print(f"usage: luban {verb} {usage}\n\n{about}\n")
    recipes = ", ".join(_recipes_of(examples, shipped))
    fields = "Fields:" if recipe is None else f"Fields, as {named[0]} has them:"
    print(f"Examples:\n{_indent(examples)}\n\nRecipes that ship: {recipes}\n\n{fields}")
    for path, kind, default, comment in describe_fields(cls, of=recipe):
        print(f"  --{path:<26} {comment} [{kind}{', default ' if default else ''}{default}]")
    raise SystemExit(0)


def _recipes_of(examples: str, shipped: Path) -> list[str]:
    """The recipes that a verb's examples name, for any device; all where they name none."""
    names = sorted(_names(shipped))
    stems = {name.rpartition("_")[0] for name in names if name in examples.split()}
    return [name for name in names if not stems or name.rpartition("_")[0] in stems]


def describe_fields(
    cls: type, prefix: str = "", of: object = None, given: Mapping[str, Any] | None = None
) -> list[tuple[str, str, str, str]]:
    """(path, type, default, comment) of every field below `cls`, variants by their names. Fields `UNSHOWN` are left out.

    Args:
        of: an instance, whose values are given in the place of defaults.
        given: some fields as plain data, as a `Partial` has them: they go before defaults, and decide which variants are described.
    """
    rows, notes = [], _comments(cls)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.metadata.get("shown", True):
            continue
        path, hint = f"{prefix}{field.name}", hints[field.name]
        if typing.get_origin(hint) is Partial:
            partial = None if of is None else getattr(of, field.name)
            rows += describe_fields(
                typing.get_args(hint)[0], f"{path}.", given=partial.filled() if isinstance(partial, Partial) else None
            )
            continue
        default: Any = field.default
        if of is not None:
            default = getattr(of, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        note, said = notes.get(field.name, ""), (given or {}).get(field.name)
        inside = said if isinstance(said, Mapping) else None
        variant = _variant_of(hint)
        name = said if inside is None else inside.get("type")
        if variant is not None and isinstance(name, str) and name in variant.registry.entries:
            rows.append((path if hint is not variant else f"{path}.type", _kind(hint), name, note or "which one"))
            rows += describe_fields(variant.registry[name], f"{path}.", given=inside)
        elif isinstance(hint, type) and issubclass(hint, Variant):
            chosen = "" if default is dataclasses.MISSING else hint.registry.name_of(type(default))
            rows.append((f"{path}.type", "|".join(hint.registry.entries), chosen, note or "which one"))
            if default is not dataclasses.MISSING:
                rows += describe_fields(type(default), f"{path}.", None if of is None else default, inside)
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            rows += describe_fields(hint, f"{path}.", None if of is None else default, inside)
        elif isinstance(default, Variant):  # one that there may be
            rows.append((path, _kind(hint), default.registry.name_of(type(default)), note))
            rows += describe_fields(type(default), f"{path}.", None if of is None else default, inside)
        else:
            default = default if said is None or inside is not None else said
            words = "" if default is dataclasses.MISSING or default in (None, "", {}) else str(default)
            rows.append((path, _kind(hint), words, note))
    return rows


def _variant_of(hint: Any) -> type[Variant] | None:
    """The base of variants that a field holds, always or perhaps."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((each for each in options if isinstance(each, type) and issubclass(each, Variant)), None)


def _kind(hint: Any) -> str:
    """A field's type as people write its values."""
    if typing.get_origin(hint) is typing.Literal:
        return "|".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        options = ("none" if option is type(None) else _kind(option) for option in typing.get_args(hint))
        return "|".join(dict.fromkeys("|".join(options).split("|")))
    if isinstance(hint, type) and issubclass(hint, Variant):
        return "|".join(hint.registry.entries)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "a table"
    if typing.get_origin(hint) is not None:
        return str(hint).replace("typing.", "")
    return getattr(hint, "__name__", str(hint))


def _comments(cls: type) -> dict[str, str]:
    """Name → comment of every field, inherited ones included: the comment on its lines, else the one directly above."""
    found: dict[str, str] = {}
    for parent in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        source = textwrap.dedent(inspect.getsource(parent))
        on_line: dict[int, str] = {}
        whole_lines: set[int] = set()  # lines with nothing but a comment
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                on_line[token.start[0]] = token.string.lstrip("# ")
                if token.line.lstrip().startswith("#"):
                    whole_lines.add(token.start[0])
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                lines = [n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in on_line]
                if not lines:
                    above = node.lineno
                    while above - 1 in whole_lines:
                        above -= 1
                    lines = list(range(above, node.lineno))
                comment = " ".join(on_line[n] for n in lines)
                found[node.target.id] = comment or found.get(node.target.id, "")
    return found
