"""Repair of text that was decoded wrongly (mojibake), by ftfy (Speer 2019)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from luban.core.errors import MissingExtra
from luban.corpus.document import Document
from luban.corpus.steps.normalise import rewritten
from luban.corpus.tally import Tally

PLAIN = re.compile(r"[\t\n\r -~]*")  # needs no repair


def unicode(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Undo wrong decodings in every text and message. Quotes, ligatures, widths and HTML entities stay as they are."""
    _library()
    yield from rewritten(documents, repair, "documents_repaired", tally)


def repair(text: str) -> str:
    """One text, repaired line by line, so that one bad line does not speak for the others."""
    if PLAIN.fullmatch(text):
        return text
    ftfy, config = _library()
    return "\n".join(line if line.isascii() else ftfy.fix_encoding(line, config) for line in text.split("\n"))


@lru_cache(maxsize=1)
def _library() -> tuple[Any, Any]:
    try:
        import ftfy
    except ImportError:
        raise MissingExtra("ftfy", "corpus", "Unicode repair") from None
    return ftfy, ftfy.TextFixerConfig(explain=False)
