"""`python:packages`: the Python sources of the packages installed beside Luban, with their licences.

A package is a distribution that left metadata (PyPA's core metadata). Its files pass the filters of `code:FOLDER`
(permissive licences, line lengths, share of letters and digits). Tests, copies of other packages and Luban itself
are left out. The first line of every document names its module, as in `python:stdlib`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.licences import SPELT, all_of, of_source_file, of_words
from luban.corpus.sources import Part, SourceContext
from luban.corpus.sources.charsets import FileDecoder
from luban.corpus.sources.code import refused
from luban.corpus.sources.licence_files import LICENCE_FILE
from luban.corpus.sources.text import looks_binary
from luban.corpus.tally import Tally

SKIPPED = re.compile(r"(?:^|/)(?:\.\.|tests?|_?vendor(?:ed)?|site-packages|[\w.-]*\.(?:dist|egg)-info)/|(?:^|/)test_")
OWN = "luban"
LARGEST = 1 << 20  # bytes of a file; longer ones are tables that a program wrote
PART_BYTES = 4 << 20  # source bytes of a part
CLASSIFIERS = {
    "License :: OSI Approved :: MIT License": "MIT",
    "License :: OSI Approved :: BSD License": "BSD-3-Clause",
    "License :: OSI Approved :: Apache Software License": "Apache-2.0",
    "License :: OSI Approved :: ISC License (ISCL)": "ISC",
    "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """One source file of an installed package."""

    path: Path
    name: str  # its path as the package's metadata gives it: torch/nn/functional.py
    package: str  # name of the distribution
    licence: str | None  # of the package, as an SPDX expression
    size: int  # bytes

    @property
    def module(self) -> str:
        """The dotted name under which the file is imported."""
        return self.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


@lru_cache(maxsize=1)
def installed_files() -> tuple[File, ...]:
    """Every file that may be read, packages and files in name order; of packages met twice the one that is imported."""
    packages: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name and name != OWN:
            packages.setdefault(name, distribution)
    return tuple(file for name in sorted(packages) for file in _files(name, packages[name]))


def _files(package: str, distribution: metadata.Distribution) -> Iterator[File]:
    names = sorted(entry.as_posix() for entry in distribution.files or () if entry.suffix == ".py")
    licence = licence_of(distribution) if names else None
    for name in names:
        path = Path(str(distribution.locate_file(name)))
        if not SKIPPED.search(name) and path.is_file() and 0 < (size := path.stat().st_size) <= LARGEST:
            yield File(path=path, name=name, package=package, licence=licence, size=size)


def licence_of(distribution: metadata.Distribution) -> str | None:
    """A distribution's licence: its SPDX expression, else its classifiers, else what its licence files say."""
    fields = distribution.metadata
    for expression in fields.get_all("License-Expression") or ():
        return all_of([expression])
    for written in fields.get_all("License") or ():  # any text
        if written.strip().lower() in SPELT:
            return all_of([written])
    if classified := all_of(filter(None, map(CLASSIFIERS.get, fields.get_all("Classifier") or ()))):
        return classified
    for entry in sorted(distribution.files or (), key=str):
        if ".dist-info/" in entry.as_posix() and LICENCE_FILE.fullmatch(entry.name):
            path = Path(str(distribution.locate_file(entry)))
            found = of_words(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
            if found:
                return found
    return None


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The files of the part, or of all packages, that pass the filters; the others are counted by reason.

    Raises:
        DataError: no package left its sources.
    """
    wanted = None if context.part is None or context.part.files is None else frozenset(context.part.files)
    found = False
    for file in installed_files():
        if wanted is not None and str(file.path) not in wanted:
            continue
        found = True
        document, licence = _document(file, context)
        reason = refused(document.text, licence) if document.text.strip() else "no source text"
        if reason:
            context.tally.drop(f"code: {reason}", document)
        else:
            yield document
    if not found:
        raise DataError("no package is installed with its Python sources beside Luban")


def _document(file: File, context: SourceContext) -> tuple[Document, str | None]:
    """The file's document and its licence: the file's own where it names one, else the package's."""
    text = ""
    try:
        if not looks_binary(file.path):
            text = FileDecoder(file.path, context.tally).decode(file.path.read_bytes())
    except OSError as error:
        context.tally.reject("unreadable files", f"{file.name}: {error.strerror}")
    licence = of_source_file(text) or file.licence
    document = Document(
        id=f"{context.label}/{file.package}/{file.name}",
        text=f"# module: {file.module}\n{text}" if text.strip() else "",
        source=context.label,
        lang="python",
        meta={"licence": licence, "package": file.package, "module": file.module},
    )
    return document, licence


def parts(name: str, tally: Tally) -> Iterator[Part]:
    """Runs of files in order, of about PART_BYTES each."""
    held: list[str] = []
    size = 0
    for file in installed_files():
        if held and size + file.size > PART_BYTES:
            yield Part(files=tuple(held))
            held, size = [], 0
        held.append(str(file.path))
        size += file.size
    if held:
        yield Part(files=tuple(held))
