"""`code:FOLDER`: a tree of source code, by licence, line length and share of letters and digits.

The filters are LLaMA's for GitHub (Touvron et al. 2023, section 2.1) at the thresholds of Codex
(Chen et al. 2021, section 3.1). A file's licence is the one that its beginning names, or else that of
the licence file beside it or in the nearest folder above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.licences import of_source_file, permitted
from luban.corpus.sources import SourceContext
from luban.corpus.sources.charsets import FileDecoder
from luban.corpus.sources.folder import walk
from luban.corpus.sources.kinds import storable_name
from luban.corpus.sources.licence_files import ENDINGS, FolderLicences, is_licence_file, is_prose
from luban.corpus.sources.text import LARGEST, looks_binary

PERMISSIVE = (
    "0BSD",
    "Apache-2.0",
    "MIT",
    "MIT-0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "ISC",
    "MIT-CMU",
    "PSF-2.0",
    "Python-2.0",
    "Unlicense",
    "CC0-1.0",
    "Zlib",
    "Apache-2.0 WITH LLVM-exception",
)
MEAN_LINE, LONGEST_LINE = 100, 1000  # characters
ALPHANUMERIC = 0.25  # of a file's characters, at least


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """Files with a known ending under a permissive licence that pass the filters; the others are counted by reason.

    Raises:
        DataError: no file passes.
    """
    root, good = Path(name), False
    licences = FolderLicences(root)
    for path in walk(root, context.tally):
        relative = storable_name(path.relative_to(root).as_posix())
        if path.suffix.lower() not in ENDINGS or is_licence_file(path):
            continue
        try:
            text = (
                None
                if path.stat().st_size > LARGEST or looks_binary(path)
                else FileDecoder(path, context.tally).decode(path.read_bytes())
            )
        except OSError as error:
            context.tally.reject("unreadable files", f"{relative}: {error.strerror}")
            continue
        licence = of_source_file(text or "", is_prose(path)) or licences.of(path.parent)
        document = Document(
            id=f"{context.label}/{relative}", text=text or "", source=context.label, meta={"licence": licence}
        )
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
    if licence is None or not permitted(licence, PERMISSIVE):
        return f"licence {licence or 'unknown'}"
    lengths = [len(line) for line in text.splitlines()]
    if max(lengths) > LONGEST_LINE:
        return "longest line"
    if sum(lengths) / len(lengths) > MEAN_LINE:
        return "mean line length"
    if sum(map(str.isalnum, text)) < ALPHANUMERIC * len(text):
        return "letters and digits"
    return None
