"""Simplified ⇄ traditional Chinese, by OpenCC."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from luban.core.errors import ConfigError, MissingExtra, nearest
from luban.corpus.document import Document
from luban.corpus.steps.normalise import rewritten
from luban.corpus.tally import Tally

CONVERSIONS = ("t2s", "s2t", "tw2s", "s2tw", "hk2s", "s2hk", "tw2sp", "s2twp")


class Chinese:
    """`chinese=t2s` (traditional to simplified), `s2t`, or OpenCC's for Taiwan and Hong Kong."""

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
        yield from rewritten(documents, lambda t: t if t.isascii() else self.convert(t), "documents_converted", tally)
