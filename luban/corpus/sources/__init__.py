"""Where documents come from. A source is a function `(name, SourceContext) -> Iterator[Document]`.

What the user writes picks the entry: `python:…` by its whole name, `KIND:PATH` by its kind, a path by what it is and
how it ends. A large source is divided into parts that workers can read on their own; the parts depend on the source alone.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from luban.core.errors import DataError, UsageError, nearest
from luban.core.registry import Registry
from luban.corpus.document import Document
from luban.corpus.sources.charsets import damaged
from luban.corpus.sources.kinds import kind_of, storable_name
from luban.corpus.sources.licence_files import FolderLicences, licensed
from luban.corpus.tally import Tally

SOURCES = Registry(
    "corpus source",
    {
        "python:stdlib": "luban.corpus.sources.stdlib:read",
        "python:objects": "luban.corpus.sources.stdlib:read_objects",
        "python:questions": "luban.corpus.sources.questions:read",
        "python:packages": "luban.corpus.sources.packages:read",
        "folder": "luban.corpus.sources.folder:read",
        "text": "luban.corpus.sources.text:read",
        "jsonl": "luban.corpus.sources.jsonl:read",
        "parquet": "luban.corpus.sources.parquet:read",
        "json": "luban.corpus.sources.json_array:read",
        "csv": "luban.corpus.sources.csv:read",
        "html": "luban.corpus.sources.html:read",
        "pdf": "luban.corpus.sources.pdf:read",
        "warc": "luban.corpus.sources.warc:read",
        "mediawiki": "luban.corpus.sources.mediawiki:read",
        "latex": "luban.corpus.sources.latex:read",
        "stackexchange": "luban.corpus.sources.stackexchange:read",
        "code": "luban.corpus.sources.code:read",
        "webtext": "luban.corpus.sources.webtext:read",
    },
)
FOLDERS = ("folder", "code", "webtext")  # kinds that read whole folders

SPLITTERS = Registry(
    "divisible source",
    {
        "folder": "luban.corpus.sources.folder:parts",
        "python:packages": "luban.corpus.sources.packages:parts",
        "jsonl": "luban.corpus.sources.jsonl:parts",
        "parquet": "luban.corpus.sources.parquet:parts",
    },
)
KIND = re.compile(r"[A-Za-z_]{2,}")  # what may be meant as a kind before a colon
PART_BYTES = 32 << 20  # of a source that can be divided, about as many bytes make one part


@dataclass(frozen=True, kw_only=True)
class SourceContext:
    """Information about the build that sources may use."""

    label: str  # how the documents' ids begin
    tally: Tally = field(default_factory=Tally)  # where to count what is not a document
    seed: int = 0  # of the held-out split
    heldout: float = 0.0  # fraction held out
    part: Part | None = None  # which part of the source is read; None is all of it
    text_field: str = "text"  # of rows, the field that holds the text

    @property
    def is_whole(self) -> bool:
        """True if the whole source is read, so that a source without documents is an error."""
        return self.part in (None, Part())


class NoTextField(DataError):
    """A table whose rows have no field with text."""


class DamagedFile(DataError):
    """A file of which nothing can be read, since it is damaged."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of a source."""

    span: tuple[int, int] | None = None  # of a file: its bytes (its row groups) from the first to before the second
    files: tuple[str, ...] | None = None  # of a folder: its files, relative to it


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a build."""

    kind: str  # an entry of SOURCES
    name: str  # what the user wrote, or one path that a glob gave
    label: str  # unique in the build, without the machine's folders
    text_field: str = "text"  # of rows, the field that holds the text
    part: Part | None = None  # the part that is meant; None is all of it

    def documents(self, tally: Tally, seed: int, heldout: float) -> Iterator[Document]:
        """The source's documents, in an order that depends on nothing but the source.

        Those of which too much could not be decoded are counted as unusable. Raises DataError where it cannot be read.
        """
        context = SourceContext(
            label=self.label, tally=tally, seed=seed, heldout=heldout, part=self.part, text_field=self.text_field
        )
        try:
            for document in self._licensed(SOURCES[self.kind](self.name, context)):
                if damaged(document.text):
                    tally.reject("texts with too many undecodable characters", document.id)
                    continue
                yield document
        except OSError as error:
            raise self._unreadable(error) from None

    def _licensed(self, documents: Iterator[Document]) -> Iterator[Document]:
        """The documents with their file's licence; sources of several files have seen to it."""
        if self.kind in FOLDERS or ":" in self.kind:
            return documents
        path = Path(self.name)
        return licensed(documents, path, self.kind, FolderLicences(path.parent))

    def parts(self, tally: Tally) -> list[Source]:
        """The source in parts of about PART_BYTES, in order; what finding them passes over is counted."""
        if self.kind not in SPLITTERS.entries:
            return [self]
        try:
            return [replace(self, part=part) for part in SPLITTERS[self.kind](self.name, tally)]
        except OSError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: OSError) -> DataError:
        return DataError(f"source {self.name} cannot be read: {error.strerror or error}")

    def size(self) -> int:
        """Bytes on disk, 0 where there are none."""
        if self.part and self.part.files is not None:
            return sum((Path(self.name) / file).stat().st_size for file in self.part.files)
        if self.part and self.part.span and self.kind != "parquet":
            return self.part.span[1] - self.part.span[0]
        return Path(self.name).stat().st_size if Path(self.name).is_file() else 0


def find_sources(names: list[str], text_field: str = "text") -> list[Source]:
    """The sources that the names stand for, with globs expanded and unique labels.

    Args:
        text_field: of rows, the field that holds the text.

    Raises:
        DataError: a path that does not exist, or a glob that matches nothing.
        UsageError: an unknown `python:…` source or kind, an address of the web, or no source at all.
    """
    if not names:
        raise UsageError(f"no source given: name files, folders, globs or {', '.join(_builtin())}")
    found: list[Source] = []
    labels: dict[str, int] = {}
    for name in names:
        for kind, path in _expand(name):
            label = name if kind == name else storable_name(Path(path).resolve().name)
            labels[label] = labels.get(label, 0) + 1
            unique = label if labels[label] == 1 else f"{label}#{labels[label]}"
            found.append(Source(kind=kind, name=path, label=unique, text_field=text_field))
    return found


def _builtin() -> list[str]:
    return [name for name in SOURCES.entries if ":" in name]


def _expand(name: str) -> list[tuple[str, str]]:
    if name in _builtin():
        return [(name, name)]
    if name.startswith("python:"):
        raise UsageError(f"unknown source '{name}'{nearest(name, _builtin())}")
    kind, _, rest = name.partition(":")
    if rest and kind in SOURCES.entries and not Path(name).exists():
        return [(kind, path) for _, found in _expand(rest) for path in _files(kind, found)]
    if Path(name).exists():
        return [(kind_of(Path(name)), name)]
    paths = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if not paths and rest.startswith("//"):
        raise UsageError(f"source {name} is an address: save what it leads to as a file first")
    if not paths and KIND.fullmatch(kind) and rest:
        kinds = [known for known in SOURCES.entries if ":" not in known]
        raise UsageError(f"source {name} does not exist, and '{kind}' is no kind of source{nearest(kind, kinds)}")
    if not paths:
        what = "matches no file" if glob.has_magic(name) else "does not exist"
        raise DataError(f"source {name} {what}")
    return [(kind_of(Path(path)), path) for path in paths]


def _files(kind: str, path: str) -> list[str]:
    """The path, or of a folder, for a kind that reads single files, those below it that are of this kind."""
    if not Path(path).is_dir() or kind in FOLDERS:
        return [path]
    found = sorted(str(file) for file in Path(path).rglob("*") if file.is_file() and kind_of(file) == kind)
    if not found:
        raise DataError(f"source {kind}:{path} holds no file of this kind: {path} alone takes every text below it")
    return found
