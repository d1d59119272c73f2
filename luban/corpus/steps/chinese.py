"""Simplified ⇄ traditional Chinese, by OpenCC.

Japanese and Korean also use Chinese characters (Han), which must not be converted: documents known to be in those
languages pass unchanged, and so do texts and lines with enough kana or hangul.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from luban.core.errors import ConfigError, MissingExtra, nearest
from luban.corpus.document import Document
from luban.corpus.languages import subtags
from luban.corpus.steps.normalise import rewritten
from luban.corpus.tally import Tally

CONVERSIONS = ("t2s", "s2t", "tw2s", "s2tw", "hk2s", "s2hk", "tw2sp", "s2twp")
# other languages written in Chinese characters, today or in the past
OTHERS = frozenset(["ja", "ko", "vi", "ryu", "ojp", "okm"])
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
KANA_AND_HANGUL = re.compile("[\u3041-\u3096\u30a1-\u30fa\u1100-\u11ff\uac00-\ud7af]")
# share of kana and hangul above which a text isn't Chinese (a single quoted の stays below it)
SHARE = 0.1


class Chinese:
    """`chinese=t2s` (traditional to simplified), `s2t`, or OpenCC's for Taiwan and Hong Kong.

    Raises:
        ConfigError: an unknown conversion.
        MissingExtra: OpenCC isn't installed.
    """

    def __init__(self, argument: str):
        if argument not in CONVERSIONS:
            raise ConfigError(f"unknown Chinese conversion '{argument}'{nearest(argument, CONVERSIONS)}")
        try:
            import opencc
        except ImportError:
            raise MissingExtra("opencc", "corpus", "Chinese conversion") from None
        self.convert = opencc.OpenCC(argument).convert

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Convert every text and message; changed documents are counted."""
        for document in documents:
            if document.lang and subtags(document.lang)[0] in OTHERS:
                yield document
            else:
                yield from rewritten([document], self.text, "documents_converted", tally)

    def text(self, text: str) -> str:
        """The text converted, except lines (or the whole) in Japanese or Korean."""
        if text.isascii() or _other(text):
            return text
        if not KANA_AND_HANGUL.search(text):
            return self.convert(text)
        return "\n".join(line if _other(line) else self.convert(line) for line in text.split("\n"))


def _other(text: str) -> bool:
    """True if kana and hangul exceed SHARE of East Asian characters."""
    others = len(KANA_AND_HANGUL.findall(text))
    return others > 0 and others >= SHARE * (others + len(HAN.findall(text)))
