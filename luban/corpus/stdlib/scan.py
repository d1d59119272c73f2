"""Read the standard library's sources with `ast`, importing none of them.

A module is cut into units: every top-level function or class is one, the rest of the module another.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "_bundled", "__pycache__"}
SKIPPED_FILES = re.compile(r"_sysconfigdata_|test_")  # what this machine's build wrote, and stray tests
PUBLIC_NAMES = {"posixpath": "os.path"}  # modules that people know by another name


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """A documented object."""

    name: str  # as people write it: os.path.join
    module: str  # os.path
    kind: str  # module, function, class or method
    signature: str  # (a, *p), empty where unknown
    doc: str  # its docstring, cleaned of indentation
    unit: str  # the unit it belongs to

    @property
    def short(self) -> str:
        """The name without its module."""
        return self.name.removeprefix(self.module + ".")

    @property
    def public(self) -> bool:
        """True if no part of the name begins with an underscore."""
        return not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Lines of a module that belong to one unit."""

    unit: str  # unit id
    start: int  # first line, from 0
    stop: int  # one past the last line
    nested: bool  # inside an `if` or `try`, which needs something in its place


@dataclass(frozen=True, kw_only=True)
class Module:
    """One source file."""

    name: str  # dotted, as people write it
    text: str  # its source
    segments: tuple[Segment, ...]  # top-level definitions, in order
    definitions: tuple[Definition, ...]  # documented objects, the module itself first

    @property
    def unit(self) -> str:
        """The unit of everything that is in no top-level definition."""
        return module_unit(self.name)

    @cached_property
    def lines(self) -> list[str]:
        """Lines with their ends."""
        return self.text.splitlines(keepends=True)

    def source_of(self, unit: str) -> str:
        """The source of one top-level definition."""
        return "".join("".join(self.lines[s.start : s.stop]) for s in self.segments if s.unit == unit)

    def without(self, units: frozenset[str] | set[str]) -> str:
        """The module's source with these units cut out."""
        kept, position = [], 0
        for segment in self.segments:
            if segment.unit not in units:
                continue
            kept += self.lines[position : segment.start]
            if segment.nested:
                first = self.lines[segment.start]
                kept.append(first[: len(first) - len(first.lstrip())] + "pass\n")
            position = segment.stop
        return "".join([*kept, *self.lines[position:]])


def module_unit(module: str) -> str:
    """The id of a whole module's unit."""
    return f"module:{module}"


def definition_unit(module: str, name: str) -> str:
    """The id of a top-level definition's unit."""
    return f"{module}:{name}"


def source_files(root: Path) -> list[Path]:
    """The library's Python files in name order, without tests, encodings and installed packages."""
    found = []
    for folder, names, files in os.walk(root):
        names[:] = sorted(name for name in names if name not in SKIPPED and not name.startswith("config-"))
        found += [Path(folder, f) for f in sorted(files) if f.endswith(".py") and not SKIPPED_FILES.match(f)]
    return sorted(found)


def scan_sources(root: Path | None = None) -> Iterator[Module]:
    """Every module of the standard library (of the tree at `root`), in path order."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in source_files(root):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            with tokenize.open(path) as file:  # honours the file's coding line
                text = file.read()
            yield parse_module(PUBLIC_NAMES.get(name, name), text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # lib2to3 and friends carry files of other Pythons


def parse_module(name: str, text: str) -> Module:
    """Cut one module into units. Raises SyntaxError where it is not this Python's."""
    return _Cutter(name).cut(text)


@dataclass
class _Cutter:
    module: str
    segments: list[Segment] = field(default_factory=list)
    definitions: list[Definition] = field(default_factory=list)

    def cut(self, text: str) -> Module:
        tree = ast.parse(text)
        doc = ast.get_docstring(tree)
        if doc:
            unit = module_unit(self.module)
            self._add(Definition(name=self.module, module=self.module, kind="module", signature="", doc=doc, unit=unit))
        self._body(tree.body, nested=False)
        # `a = 1; def`-like crowding cannot happen, but form feeds make splitlines disagree with ast
        if any(mark in text for mark in "\f\x0b\x1c\x1d\x1e\x85\u2028\u2029"):
            text = re.sub("[\f\x0b\x1c\x1d\x1e\x85\u2028\u2029]", " ", text)
        return Module(name=self.module, text=text, segments=tuple(self.segments), definitions=tuple(self.definitions))

    def _body(self, body: list[ast.stmt], nested: bool) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                self._definition(node, nested)
            elif isinstance(node, ast.If):
                self._body(node.body, True)
                self._body(node.orelse, True)
            elif isinstance(node, ast.Try):
                for part in (node.body, *(h.body for h in node.handlers), node.orelse, node.finalbody):
                    self._body(part, True)

    def _definition(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, nested: bool) -> None:
        unit = definition_unit(self.module, node.name)
        start = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        self.segments.append(Segment(unit=unit, start=start, stop=node.end_lineno or start + 1, nested=nested))
        self._object(node, self.module, unit)

    def _object(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, prefix: str, unit: str) -> None:
        name = f"{prefix}.{node.name}"
        is_class, in_class = isinstance(node, ast.ClassDef), prefix != self.module
        doc = ast.get_docstring(node)
        if doc:
            kind = "class" if is_class else "method" if in_class else "function"
            self._add(
                Definition(
                    name=name,
                    module=self.module,
                    kind=kind,
                    signature=_signature(node, in_class),
                    doc=inspect.cleandoc(doc),
                    unit=unit,
                )
            )
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    self._object(child, name, unit)

    def _add(self, definition: Definition) -> None:
        if definition.doc.strip():
            self.definitions.append(definition)


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, bound: bool) -> str:
    """`(a, b=1)`; of a class its `__init__`'s, of a method without what it is bound to."""
    if isinstance(node, ast.ClassDef):
        init = next((c for c in node.body if isinstance(c, ast.FunctionDef) and c.name == "__init__"), None)
        return _signature(init, True) if init else ""
    text = ast.unparse(node.args)
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in node.decorator_list)
    if bound and not static:
        text = re.sub(r"^(self|cls|mcls|metacls)\b(, |$)", "", text).removeprefix("/, ")
    return f"({text})"
