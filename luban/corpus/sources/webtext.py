"""`webtext:FOLDER`: pages that people voted for, as in WebText (Radford et al. 2019, section 2.1).

The folder holds `links.jsonl` (or `.gz`), posts with an outbound `url` and the `votes` (or `score`) they got, and the
pages: web archives, or JSON lines with `url` and `text`. A page counts that a post of 3 votes or more points to;
each address counts once; Wikipedia is left out, since so many evaluation sets come from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.sources import SOURCES, SourceContext
from luban.corpus.sources.folder import walk
from luban.corpus.sources.kinds import kind_of, storable_name
from luban.corpus.sources.licence_files import FolderLicences, licensed
from luban.corpus.sources.text import lines

VOTES = 3  # of a post, at least
LINKS = ("links.jsonl", "links.jsonl.gz")
EXCLUDED = ("wikipedia.org",)


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """Pages in file order, the first of each address.

    Raises:
        DataError: no list of links, or no page that a link points to.
    """
    root = Path(name)
    listed = next((root / file for file in LINKS if (root / file).is_file()), None)
    if listed is None:
        raise DataError(f"source {name} holds no links.jsonl with the posts and their votes")
    voted, seen = voted_links(listed, context), set()
    licences = FolderLicences(root)
    for path in walk(root, context.tally):
        kind = kind_of(path)
        if path == listed or kind not in ("warc", "jsonl"):
            continue
        label = f"{context.label}/{storable_name(path.relative_to(root).as_posix())}"
        for document in licensed(_documents(kind, path, replace(context, label=label)), path, kind, licences):
            url = address(str((document.meta or {}).get("url") or ""))
            reason = "no votes" if url not in voted else "address met before" if url in seen else None
            if reason:
                context.tally.drop(f"webtext: {reason}", document)
                continue
            seen.add(url)
            yield document
    if not seen:
        raise DataError(f"source {name} holds no page that a post with {VOTES} votes points to")


def _documents(kind: str, path: Path, context: SourceContext) -> Iterator[Document]:
    """The documents of one file; a file that cannot be read or has none is counted."""
    try:
        yield from SOURCES[kind](str(path), context)
    except OSError as error:
        context.tally.reject("unreadable files", f"{context.label}: {error.strerror}")
    except DataError as error:
        context.tally.reject("files without documents", f"{context.label}: {error}")


def voted_links(path: Path, context: SourceContext) -> set[str]:
    """The addresses with enough votes."""
    found = set()
    for line in lines(path, context):
        try:
            post = json.loads(line)
            url, votes = address(str(post["url"])), int(post["votes"] if "votes" in post else post["score"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if line.strip():
                context.tally.reject("invalid links", line.decode(errors="replace"))
            continue
        host = url.split("/")[0]
        if votes >= VOTES and host and not any(host == other or host.endswith("." + other) for other in EXCLUDED):
            found.add(url)
    return found


def address(url: str) -> str:
    """A URL without scheme, `www.`, fragment and the last slash, so that spellings of one page are the same."""
    try:
        parts = urlsplit(url.strip())
        host = (parts.hostname or "").removeprefix("www.")
    except ValueError:
        return ""
    return f"{host}{parts.path.rstrip('/')}{'?' + parts.query if parts.query else ''}"
