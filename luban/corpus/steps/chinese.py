"""Simplified ⇄ traditional Chinese, by OpenCC.

Japanese and Korean also write Han signs, which must not be converted: what is known to be in those languages passes, and
so do texts and lines in which kana or hangul stand beside the Han signs.
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
OTHERS = frozenset(
    ["ja", "ko", "vi", "ryu", "ojp", "okm"]
)  # languages beside Chinese that have been written in Han signs
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa\u1100-\u11ff\uac00-\ud7af]")  # kana and hangul
SHARE = (
    0.1  # of kana and hangul among these and Han signs, from which a text is not Chinese: a quoted の makes no Japanese
)


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
        """Every text and message converted; documents that change are counted."""
        for document in documents:
            if document.lang and subtags(document.lang)[0] in OTHERS:
                yield document
            else:
                yield from rewritten([document], self.text, "documents_converted", tally)

    def text(self, text: str) -> str:
        """One text converted, except where it is Japanese or Korean."""
        if text.isascii() or _other(text):
            return text
        if not KANA.search(text):
            return self.convert(text)
        return "\n".join(line if _other(line) else self.convert(line) for line in text.split("\n"))


def _other(text: str) -> bool:
    """Whether so many kana or hangul stand among the Han signs that the text is not Chinese."""
    kana = len(KANA.findall(text))
    return kana > 0 and kana >= SHARE * (kana + len(HAN.findall(text)))
