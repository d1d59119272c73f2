"""MediaWiki dumps (`…-pages-articles.xml`, `.bz2`, `.gz`): articles as plain text, by mwparserfromhell."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from luban.core.errors import DataError, MissingExtra
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.xml import child, elements

MEDIA = re.compile(
    r"^\s*(?:File|Image|Category|Datei|Bild|Kategorie|Fichier|Catégorie|文件|分类|分類)\s*:", re.IGNORECASE
)
DROPPED_TAGS = ("ref", "gallery", "math", "timeline", "syntaxhighlight", "table", "references")
BLANK = re.compile(r"\n{3,}")
MAGIC = re.compile(r"__[A-Z]+__")


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """Articles of the main namespace that are no redirects.

    Raises:
        DataError: no article in it.
    """
    good = False
    for page in elements(Path(name), "page", context):
        namespace, title, revision = child(page, "ns"), child(page, "title"), child(page, "revision")
        if child(page, "redirect") is not None or (namespace is not None and namespace.text != "0"):
            context.tally.add("pages_that_are_no_articles")
            continue
        source = child(revision, "text") if revision is not None else None
        text = plain((source.text if source is not None else None) or "")
        if not text:
            context.tally.add("articles_without_text")
            continue
        good = True
        number = child(page, "id")
        ident = number.text if number is not None else (title.text if title is not None else "")
        yield Document(id=f"{context.label}#{ident}", text=text, source=context.label,
                       meta={"title": title.text if title is not None else None, "licence": "CC-BY-SA-4.0"})  # fmt: skip
    if not good:
        raise DataError(f"source {name} holds no article")


def plain(wikitext: str) -> str:
    """An article's text without templates, tables, references, media and markup; headings stand on their own lines."""
    parser = _library()
    code = parser.parse(MAGIC.sub("", wikitext))
    for link in code.filter_wikilinks():
        if MEDIA.match(str(link.title)):
            _remove(code, link)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in DROPPED_TAGS):
        _remove(code, tag)
    lines = (line.strip() for line in code.strip_code(normalize=True, collapse=True).split("\n"))
    return BLANK.sub("\n\n", "\n".join(lines)).strip()


def _remove(code: Any, node: Any) -> None:
    with contextlib.suppress(ValueError):  # it stood inside another one that is gone already
        code.remove(node)


def _library() -> Any:
    try:
        import mwparserfromhell
    except ImportError:
        raise MissingExtra("mwparserfromhell", "corpus", "reading MediaWiki dumps") from None
    return mwparserfromhell
