"""`code:FOLDER`: a tree of source code, by licence, line length and share of letters and digits.

The filters are LLaMA's for GitHub (Touvron et al. 2023, section 2.1) at the thresholds of Codex
(Chen et al. 2021, section 3.1). A file's licence is the one that its beginning names, or else that of
the licence file beside it or in the nearest folder above it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.licences import all_of, any_of, of_source_file, of_text, permitted
from luban.corpus.sources import SourceContext
from luban.corpus.sources.charsets import FileDecoder
from luban.corpus.sources.folder import walk
from luban.corpus.sources.kinds import storable_name
from luban.corpus.sources.text import LARGEST, looks_binary

LANGUAGES = (
    "c h cc cpp hpp cs css cu go hs html java jl js json kt lua m md ml php pl ps1 py pyi r rb rs rst scala sh sql swift "
    "tex toml ts tsx vb yaml yml zig"
)
ENDINGS = frozenset(f".{ending}" for ending in LANGUAGES.split())
PROSE = (".md", ".rst", ".html")  # among them, those in which a licence may stand
LICENCE_FILE = re.compile(
    r"(?:(?P<before>[a-z0-9.]+)[-_])?(?:licen[cs]es?|copying|unlicen[cs]e)(?:[-_.](?P<after>.+))?", re.IGNORECASE
)
PLAIN = ("txt", "md", "rst", "html", "lesser")  # what may follow LICENSE without naming one of several to choose from
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
    licences: dict[Path, str | None] = {}
    for path in walk(root, context.tally):
        relative = storable_name(path.relative_to(root).as_posix())
        if path.suffix.lower() not in ENDINGS or _licence_file(path):
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
        licence = of_source_file(text or "", path.suffix.lower() in PROSE) or _licence(path.parent, root, licences)
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


def _licence_file(path: Path) -> re.Match[str] | None:
    """True if the file name is that of a licence: LICENSE, COPYING.txt, LICENSE-MIT, MIT-LICENSE; not license.py."""
    suffix = path.suffix.lower()
    return None if suffix in ENDINGS and suffix not in PROSE else LICENCE_FILE.fullmatch(path.name)


def _read(path: Path) -> str | None:
    """The text of a licence file; None where it is no file or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError:
        return None


def _licence(folder: Path, root: Path, known: dict[Path, str | None]) -> str | None:
    """The licence of a folder's files: of its own licence files, or else of the folder above.

    Where all of several name one in their names, as LICENSE-MIT and LICENSE-APACHE do, the user has the choice; else all apply.
    """
    if folder not in known:
        found, choice, any_file = [], True, False
        for path in sorted(folder.iterdir()):
            match = _licence_file(path)
            text = _read(path) if match else None
            any_file = any_file or text is not None
            if match and text and (name := of_text(text)):
                found.append(name)
                choice = choice and bool(match["before"] or (match["after"] or "txt").lower() not in PLAIN)
        above = None if any_file or folder == root else _licence(folder.parent, root, known)
        known[folder] = (any_of(found) if choice else all_of(found)) or above
    return known[folder]
