"""The whole library, scanned once a process, and its held-out units."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

from luban.corpus.split import is_heldout
from luban.corpus.stdlib.compiled import scan_compiled
from luban.corpus.stdlib.scan import Definition, Module, module_unit, scan_sources

SHARED = 40  # characters above which a docstring met elsewhere is the same docstring, not a coincidence
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Library:
    """Modules with their sources, and the documented objects written in C."""

    modules: tuple[Module, ...]
    compiled: tuple[Definition, ...]

    @cached_property
    def definitions(self) -> list[Definition]:
        """Every documented object once by name, sources before C, in scan order."""
        found: dict[str, Definition] = {}
        for definition in self._all():
            found.setdefault(definition.name, definition)
        return list(found.values())

    def _all(self) -> Iterable[Definition]:
        for module in self.modules:
            yield from module.definitions
        yield from self.compiled

    def unit_texts(self) -> dict[str, str]:
        """Every unit's own text: its source, and its docstrings in C."""
        texts: dict[str, list[str]] = defaultdict(list)
        for module in self.modules:
            units = {segment.unit for segment in module.segments}
            texts[module.unit].append(module.without(units))
            for unit in units:
                texts[unit].append(module.source_of(unit))
        for definition in self._all():  # as read, since a source may spell it with escapes
            texts[definition.unit].append(definition.doc)
        return {unit: "\n".join(parts) for unit, parts in texts.items()}

    @cached_property
    def units_of_module(self) -> dict[str, set[str]]:
        """Module unit → the units of its definitions."""
        found: dict[str, set[str]] = defaultdict(set)
        for module in self.modules:
            found[module.unit] |= {segment.unit for segment in module.segments}
        for definition in self.compiled:
            found[module_unit(definition.module)].add(definition.unit)
        return found

    @cached_property
    def repeats(self) -> dict[str, set[str]]:
        """Unit → other units whose text contains one of its docstrings (of more than SHARED characters)."""
        index: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
        for definition in self._all():
            words = WORD.findall(definition.doc)
            joined = " ".join(words)
            if len(" ".join(definition.doc.split())) > SHARED and len(words) >= 4:
                start = 1 if len(words) > 5 else 0  # the first word may stand inside another one
                index[tuple(words[start : start + 4])].append((f"{joined}", definition.unit))
        found: dict[str, set[str]] = defaultdict(set)
        for unit, text in self.unit_texts().items():
            words = WORD.findall(text)
            joined = " ".join(words)
            for key in index.keys() & set(zip(words, words[1:], words[2:], words[3:], strict=False)):
                for doc, owner in index[key]:
                    if owner != unit and doc in joined:
                        found[owner].add(unit)
        return found

    def heldout_units(self, fraction: float, seed: int) -> frozenset[str]:
        """The units held out: by hash of their ids, with a module all its definitions, with a docstring its copies."""
        modules = self.units_of_module
        every = set(modules) | {unit for units in modules.values() for unit in units}
        queue = [unit for unit in sorted(every) if is_heldout(unit, fraction, seed)]
        held: set[str] = set()
        while queue:
            unit = queue.pop()
            if unit not in held:
                held.add(unit)
                queue += sorted(modules.get(unit, ())) + sorted(self.repeats.get(unit, ()))
        return frozenset(held)


@lru_cache(maxsize=1)
def scan_library() -> Library:
    """This Python's standard library."""
    return Library(modules=tuple(scan_sources()), compiled=tuple(scan_compiled()))
