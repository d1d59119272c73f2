"""PDF files: the text of their pages, by pypdf."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

from luban.core.errors import DataError, MissingExtra, problem
from luban.corpus.document import Document
from luban.corpus.sources import DamagedFile, SourceContext

DIVIDED = re.compile(r"(?<=[^\W\d_])[-\u00ad]\n(?=[a-zà-ÿ])")  # a word divided at the end of a line


def read(name: str, context: SourceContext) -> Iterator[Document]:
    """The file as one document, its pages separated by blank lines, its title in `meta`; words that are divided at the end of a
    line are joined. Pages that can't be read are counted.

    Raises:
        DamagedFile: no page can be read.
        DataError: a password is needed, or no page holds text, as in scans.
    """
    pypdf, texts, failed = _library(), [], 0
    try:
        reader = pypdf.PdfReader(name)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(f"source {name} is encrypted: save it without a password first")
        count, title = len(reader.pages), (reader.metadata and reader.metadata.title) or ""
    except DataError:
        raise
    except Exception as error:  # pypdf raises whatever a damaged object leads to
        raise DamagedFile(f"source {name} is no readable PDF: {problem(error)}") from None
    for number in range(count):
        try:
            texts.append(DIVIDED.sub("", reader.pages[number].extract_text()).strip())
        except Exception as error:
            context.tally.reject("unreadable pages of PDFs", f"{context.label} page {number + 1}: {problem(error)}")
            failed += 1
    text = "\n\n".join(filter(None, texts))
    if not text:
        if failed:
            raise DamagedFile(f"source {name} has no page that can be read")
        raise DataError(f"source {name} is empty: {count} pages without text (a scan must be read by OCR first)")
    meta = {"title": str(title).strip()} if str(title).strip() else None
    yield Document(id=context.label, text=text, source=context.label, meta=meta)


@lru_cache(maxsize=1)
def _library() -> ModuleType:
    try:
        import pypdf
    except ImportError:
        raise MissingExtra("pypdf", "corpus", "reading PDF") from None
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what it mends by itself is of no use to the reader
    return pypdf
