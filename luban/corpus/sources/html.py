"""HTML pages: the main text without menus, headers and footers, by resiliparse (Bevendorff et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from luban.core.errors import DataError, MissingExtra
from luban.corpus.document import Document
from luban.corpus.sources import SourceContext
from luban.corpus.sources.charsets import page_text
from luban.corpus.sources.text import whole


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The page as one document, its title in `meta`. Raises DataError where it holds no text."""
    text, title = extract(whole(Path(name), context))
    if not text.strip():
        raise DataError(f"source {name} is empty: a page without text")
    yield Document(id=context.label, text=text, source=context.label, meta={"title": title} if title else None)


def extract(data: bytes, declared: str | None = None) -> tuple[str, str]:
    """(main text, title) of a page's bytes; `declared` is the encoding that came with them, as in `page_text`."""
    tree_of, plain = _library()
    tree = tree_of(page_text(data, declared))
    text = plain(tree, main_content=True, alt_texts=False, list_bullets=False, comments=False)
    return text, (tree.title or "").strip()


def strip(fragment: str) -> str:
    """All the text of an HTML fragment, such as a post, code kept as it stands."""
    tree_of, plain = _library()
    return plain(tree_of(fragment), main_content=False, alt_texts=False, list_bullets=False).strip()


@lru_cache(maxsize=1)
def _library() -> tuple[Any, Any]:
    try:
        from resiliparse.extract.html2text import extract_plain_text
        from resiliparse.parse.html import HTMLTree
    except ImportError:
        raise MissingExtra("resiliparse", "corpus", "reading HTML") from None
    return HTMLTree.parse, extract_plain_text
