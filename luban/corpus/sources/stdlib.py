"""`python:stdlib`: the standard library's sources and the docstrings of its documented objects.

The split is by unit (see `luban.corpus.stdlib.library`): a held-out definition is cut out of its module's
training document and becomes a held-out document of its own; so do its docstrings. The first line of every
source document names its module, which ties the names in it to where they are found.
"""

from __future__ import annotations

from collections.abc import Iterator

from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.split import HELDOUT, TRAIN
from luban.corpus.stdlib.library import Library, scan_library
from luban.corpus.stdlib.scan import Definition, Module


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """Module sources in path order, then the docstrings of public objects."""
    library = scan_library()
    heldout = library.heldout_units(context.heldout, context.seed)
    yield from documents(library, heldout, context.label)


def documents(library: Library, heldout: frozenset[str], label: str) -> Iterator[Document]:
    """The library's documents, each with its split."""
    for module in library.modules:
        yield from _sources(module, heldout, label)
    yield from _docstrings(library, heldout, label)


def read_objects(name: str, context: SourceContext) -> Iterator[Document]:
    """`python:objects`: the docstrings of public objects alone."""
    library = scan_library()
    yield from _docstrings(library, library.heldout_units(context.heldout, context.seed), context.label)


def _docstrings(library: Library, heldout: frozenset[str], label: str) -> Iterator[Document]:
    for definition in library.definitions:
        if definition.public:
            yield Document(
                id=f"{label}/doc/{definition.name}",
                text=docstring_text(definition),
                source=label,
                lang="en",
                meta={"object": definition.name, "module": definition.module},
                split=HELDOUT if definition.unit in heldout else TRAIN,
            )


def docstring_text(definition: Definition) -> str:
    """`name(signature)` and the docstring below it."""
    return f"{definition.name}{definition.signature}\n\n{definition.doc}\n"


def _sources(module: Module, heldout: frozenset[str], label: str) -> Iterator[Document]:
    ident, meta = f"{label}/source/{module.name}", {"module": module.name}
    header = f"# module: {module.name}\n"
    if module.unit in heldout:
        if module.text.strip():
            yield Document(id=ident, text=header + module.text, source=label, lang="python", meta=meta, split=HELDOUT)
        return
    rest = module.without(heldout)
    if rest.strip():
        yield Document(id=ident, text=header + rest, source=label, lang="python", meta=meta, split=TRAIN)
    for unit in dict.fromkeys(segment.unit for segment in module.segments):
        if unit in heldout:
            yield Document(
                id=f"{label}/source/{unit}",
                text=header + module.source_of(unit),
                source=label,
                lang="python",
                meta=meta,
                split=HELDOUT,
            )
