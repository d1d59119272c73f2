"""Which kind of source a path is: by what it is, how its name ends, and for XML and JSON how it begins."""

from __future__ import annotations

import json
from pathlib import Path

from luban.corpus.sources.charsets import open_text
from luban.corpus.sources.compression import DAMAGED, plain_name

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".pdf": "pdf",
    ".warc": "warc",
    ".wet": "warc",
    ".tex": "latex",
    ".csv": "csv",
    ".tsv": "csv",
}
HEAD = 64 << 10  # bytes looked at


def storable_name(name: str) -> str:
    r"""A path or a part of one as text that UTF-8 can hold: bytes of it that are no UTF-8 become `\xhh`."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def kind_of(path: Path) -> str:
    """The entry of SOURCES that reads this path."""
    if path.is_dir():
        return "folder"
    name = plain_name(path)
    ending = Path(name).suffix
    if ending == ".xml":
        return _xml(_head(path), name)
    if ending == ".json":
        return _json(_head(path))
    return ENDINGS.get(ending, "text")


def _head(path: Path) -> bytes:
    try:
        with open_text(path) as file:
            return file.read(HEAD).removeprefix(b"\xef\xbb\xbf").lstrip()
    except DAMAGED:  # reading it meets the error again, and counts it
        return b""


def _xml(head: bytes, name: str) -> str:
    if b"<mediawiki" in head or "pages-" in name:
        return "mediawiki"
    return "stackexchange" if b"<posts" in head or name == "posts.xml" else "text"


def _json(head: bytes) -> str:
    """An array of objects, JSON lines under another name, or any other JSON, which is text."""
    if head[:1] == b"[" and head[1:].lstrip()[:1] == b"{":
        return "json"
    first, _, rest = head.partition(b"\n")
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        return "text"
    follows = rest.lstrip()[:1] == b"{"
    return "jsonl" if isinstance(row, dict) and (follows or "text" in row or "messages" in row) else "text"
