"""The licence of a file: what its beginning says, or else the licence files beside it or in the nearest folder above it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from luban.corpus.document import Document
from luban.corpus.licences import HEADER, all_of, any_of, of_source_file, of_words
from luban.corpus.sources.charsets import FileDecoder, open_text
from luban.corpus.sources.compression import DAMAGED, plain_name
from luban.corpus.tally import Tally

LANGUAGES = (
    "c h cc cpp hpp cs css cu go hs html java jl js json kt lua m md ml php pl ps1 py pyi r rb rs rst scala sh sql swift "
    "tex toml ts tsx vb yaml yml zig"
)
ENDINGS = frozenset(f".{ending}" for ending in LANGUAGES.split())  # of source files
PROSE = (".md", ".rst", ".html")  # among them, those in which a licence may stand
LICENCE_FILE = re.compile(
    r"(?:(?P<before>[a-z0-9.]+)[-_])?(?:licen[cs]es?|copying|unlicen[cs]e)(?:[-_.](?P<after>.+))?", re.IGNORECASE
)
PLAIN = ("txt", "md", "rst", "html", "lesser")  # what may follow LICENSE without naming one of several to choose from
ONE_WORK = ("text", "html", "latex", "pdf")  # kinds of files that are one work; the others hold rows or pages of many


def is_licence_file(path: Path) -> re.Match[str] | None:
    """A match if the file name is that of a licence: LICENSE, COPYING.txt, LICENSE-MIT, MIT-LICENSE; not license.py."""
    suffix = path.suffix.lower()
    return None if suffix in ENDINGS and suffix not in PROSE else LICENCE_FILE.fullmatch(path.name)


def is_prose(path: Path) -> bool:
    """True for documentation and plain text, in which words about a licence need not be about the file's own."""
    suffix = Path(plain_name(path)).suffix
    return suffix in PROSE or suffix not in ENDINGS


class FolderLicences:
    """The licences of the folders below `root`, from their licence files, each read once."""

    def __init__(self, root: Path):
        self.root = root
        self.known: dict[Path, str | None] = {}

    def of(self, folder: Path) -> str | None:
        """The licence of a folder's files: of its own licence files, or else of the folder above; None above `root`.

        Where all of several name one in their names, as LICENSE-MIT and LICENSE-APACHE do, the user has the choice; else
        all apply.
        """
        if folder not in self.known:
            found, choice, any_file = [], True, False
            for path in _entries(folder):
                match = is_licence_file(path)
                text = _read(path) if match else None
                any_file = any_file or text is not None
                if match and text and (name := of_words(text)):
                    found.append(name)
                    choice = choice and bool(match["before"] or (match["after"] or "txt").lower() not in PLAIN)
            above = None if any_file or folder == self.root else self.of(folder.parent)
            self.known[folder] = (any_of(found) if choice else all_of(found)) or above
        return self.known[folder]


def licensed(documents: Iterable[Document], path: Path, kind: str, folders: FolderLicences) -> Iterator[Document]:
    """The documents of the file `path`, those without a licence of their own with the file's in their meta.

    Args:
        kind: of the source that reads the file; what a file of rows says at its beginning is said of a row.
    """
    licence: str | None = None
    looked = False
    for document in documents:
        own = (document.meta or {}).get("licence")
        if own and isinstance(own, str):
            yield document
            continue
        if not looked:
            head = _head(path) if kind in ONE_WORK else ""
            licence, looked = of_source_file(head, is_prose(path)) or folders.of(path.parent), True
        yield replace(document, meta={**(document.meta or {}), "licence": licence}) if licence else document


def _head(path: Path) -> str:
    try:
        with open_text(path) as file:
            return FileDecoder(path, Tally()).decode(file.read(HEADER), final=False)
    except DAMAGED:
        return ""


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str | None:
    """The text of a licence file; None where it is no file or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    except OSError:
        return None
