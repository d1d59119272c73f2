"""Folders: every text, JSONL and Parquet file below, in name order; hidden and binary files are passed over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import SOURCES, SourceContext, kind_of
from luban.corpus.sources.text import looks_binary, read_file


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The documents below the folder; what is skipped is counted.

    Raises:
        DataError: nothing in it is text.
    """
    found = False
    for path in walk(Path(name), context):
        label = f"{context.label}/{path.relative_to(name).as_posix()}"
        for document in _documents(path, label, context):
            found = True
            yield document
    if not found:
        raise DataError(f"source {name} holds no text")


def _documents(path: Path, label: str, context: SourceContext) -> Iterator[Document]:
    kind = kind_of(path)
    try:
        if kind == "text" and looks_binary(path):
            context.tally.add("binary_files_skipped")
        elif kind == "text":
            yield from read_file(path, label, context)
        elif path.stat().st_size:
            yield from SOURCES[kind](str(path), replace(context, label=label))
    except OSError:
        context.tally.add("unreadable_files_skipped")


def walk(root: Path, context: SourceContext) -> Iterator[Path]:
    """Files below `root` in name order, links followed, no folder entered twice."""
    seen: set[tuple[int, int]] = set()

    def visit(folder: Path) -> Iterator[Path]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            context.tally.add("folder_links_skipped")
            return
        seen.add((status.st_dev, status.st_ino))
        try:
            entries = sorted(os.listdir(folder))
        except OSError:
            context.tally.add("unreadable_folders_skipped")
            return
        for entry in entries:
            path = folder / entry
            if entry.startswith(".") or entry == "__pycache__":
                continue
            if path.is_dir():
                yield from visit(path)
            elif path.is_file():
                yield path

    yield from visit(root)
