"""Folders: every file below that a source reads, in name order; hidden and binary files are passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import PART_BYTES, SOURCES, NoTextField, Part, SourceContext
from luban.corpus.sources.kinds import kind_of, storable_name
from luban.corpus.sources.licence_files import FolderLicences, licensed
from luban.corpus.sources.text import looks_binary, read_file
from luban.corpus.tally import Tally

PART_FILES = 2048  # files read by one worker at a time, at the most


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The documents below the folder; what is skipped is counted.

    Raises:
        DataError: nothing in it is text.
    """
    root, found = Path(name), False
    licences = FolderLicences(root)
    files = context.part.files if context.part else None
    for path in walk(root, context.tally) if files is None else (root / file for file in files):
        label = f"{context.label}/{storable_name(path.relative_to(name).as_posix())}"
        for document in _documents(path, label, context, licences):
            found = True
            yield document
    if files is None and not found:
        raise DataError(f"source {name} holds no text")


def _documents(path: Path, label: str, context: SourceContext, licences: FolderLicences) -> Iterator[Document]:
    kind = kind_of(path)
    try:
        if kind == "text" and looks_binary(path):
            context.tally.add("binary_files_skipped")
        elif kind == "text":
            yield from licensed(read_file(path, label, context), path, kind, licences)
        elif path.stat().st_size:
            documents = SOURCES[kind](str(path), replace(context, label=label))
            yield from licensed(documents, path, kind, licences)
    except OSError as error:
        context.tally.reject("unreadable files", f"{label}: {error.strerror}")
    except NoTextField:  # a table of something else
        context.tally.add("tables_without_text_skipped")
    except DataError as error:  # one damaged file among many is no reason to stop
        context.tally.reject("files without documents", f"{label}: {error}")


def parts(name: str, tally: Tally) -> Iterator[Part]:
    """Runs of files in name order, of PART_BYTES or PART_FILES at the most, a larger file alone."""
    root, held, size = Path(name), [], 0
    for path in walk(root, tally):
        try:
            more = path.stat().st_size
        except OSError:
            more = 0
        if held and (size + more > PART_BYTES or len(held) == PART_FILES):
            yield Part(files=tuple(held))
            held, size = [], 0
        held.append(path.relative_to(root).as_posix())
        size += more
    if held:
        yield Part(files=tuple(held))


def walk(root: Path, tally: Tally) -> Iterator[Path]:
    """Files below `root` in name order, links followed, no folder entered twice."""
    seen: set[tuple[int, int]] = set()

    def visit(folder: Path) -> Iterator[Path]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            tally.add("folder_links_skipped")
            return
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = sorted(os.listdir(folder))
        except OSError:
            tally.reject("unreadable folders", storable_name(folder.relative_to(root).as_posix()))
            return
        for entry in entries:
            path = folder / entry
            if entry.startswith(".") or entry == "__pycache__":
                continue
            try:
                is_folder, is_file = path.is_dir(), path.is_file()
            except OSError as error:
                tally.reject(
                    "unreadable files", f"{storable_name(path.relative_to(root).as_posix())}: {error.strerror}"
                )
                continue
            if is_folder:
                yield from visit(path)
            elif is_file:
                yield path

    yield from visit(root)
