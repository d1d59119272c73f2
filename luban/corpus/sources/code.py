"""`code:FOLDER`: a tree of source code, by licence, line length and share of letters and digits.

The filters are LLaMA's for GitHub (Touvron et al. 2023, section 2.1) at the thresholds of Codex
(Chen et al. 2021, section 3.1). A file's licence is the one beside it or in the nearest folder above it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.folder import walk
from luban.corpus.sources.text import LARGEST, decode, looks_binary

ENDINGS = frozenset(
    [
        ".c",
        ".h",
        ".cc",
        ".cpp",
        ".hpp",
        ".cs",
        ".css",
        ".cu",
        ".go",
        ".hs",
        ".html",
        ".java",
        ".jl",
        ".js",
        ".json",
        ".kt",
        ".lua",
        ".m",
        ".md",
        ".ml",
        ".php",
        ".pl",
        ".ps1",
        ".py",
        ".pyi",
        ".r",
        ".rb",
        ".rs",
        ".rst",
        ".scala",
        ".sh",
        ".sql",
        ".swift",
        ".tex",
        ".toml",
        ".ts",
        ".tsx",
        ".vb",
        ".yaml",
        ".yml",
        ".zig",
    ]
)
LICENCE_FILES = ("license", "licence", "copying", "unlicense")
PERMISSIVE = ("Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unlicense", "CC0-1.0")
PHRASES = (
    ("Apache-2.0", r"apache license,?\s+version 2\.0"),
    ("GPL", r"gnu (?:lesser |affero )?general public license"),
    ("MPL-2.0", r"mozilla public license"),
    ("MIT", r"permission is hereby granted, free of charge, to any person obtaining a copy"),
    ("ISC", r"permission to use, copy, modify, and(?:/or)? distribute this software for any purpose"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms.*neither the name"),
    ("BSD-2-Clause", r"redistribution and use in source and binary forms"),
    ("Unlicense", r"this is free and unencumbered software"),
    ("CC0-1.0", r"cc0 1\.0 universal"),
)
MEAN_LINE, LONGEST_LINE = 100, 1000  # characters
ALPHANUMERIC = 0.25  # of a file's characters, at least


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """Files with a known ending under a permissive licence that pass the filters; the others are counted by reason.

    Raises:
        DataError: no file passes.
    """
    root, good = Path(name), False
    licences: dict[Path, str | None] = {}
    for path in walk(root, context.tally):
        relative = path.relative_to(root).as_posix()
        if path.suffix.lower() not in ENDINGS or path.stem.lower() in LICENCE_FILES:
            continue
        licence = _licence(path.parent, root, licences)
        try:
            text = None if path.stat().st_size > LARGEST or looks_binary(path) else decode(path.read_bytes(), context)
        except OSError as error:
            context.tally.spoilt("unreadable files", f"{relative}: {error.strerror}")
            continue
        document = Document(id=f"{context.label}/{relative}", text=text or "", source=context.label,
                            meta={"licence": licence})  # fmt: skip
        reason = "no source text" if not text or not text.strip() else refused(text, licence)
        if reason:
            context.tally.drop(f"code: {reason}", document)
            continue
        good = True
        yield document
    if not good:
        raise DataError(f"source {name} holds no source file that passes the filters (permissive licences only)")


def refused(text: str, licence: str | None) -> str | None:
    """The first filter that a file fails, or None."""
    if licence not in PERMISSIVE:
        return f"licence {licence or 'unknown'}"
    lengths = [len(line) for line in text.splitlines()]
    if max(lengths) > LONGEST_LINE:
        return "longest line"
    if sum(lengths) / len(lengths) > MEAN_LINE:
        return "mean line length"
    if sum(map(str.isalnum, text)) < ALPHANUMERIC * len(text):
        return "letters and digits"
    return None


def licence_of(text: str) -> str | None:
    """The licence whose words stand in a licence file, or None."""
    folded = " ".join(text.lower().split())
    return next((name for name, phrase in PHRASES if re.search(phrase, folded)), None)


def _licence(folder: Path, root: Path, known: dict[Path, str | None]) -> str | None:
    if folder not in known:
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.stem.lower() in LICENCE_FILES)
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        above = None if files or folder == root else _licence(folder.parent, root, known)
        known[folder] = next(filter(None, map(licence_of, texts)), above)
    return known[folder]
