"""Passages of a fixed number of words, as DPR's 100 (Karpukhin et al. 2020, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from luban.corpus.words import words
from luban.retrieval.passages import PassageRule, Span


@dataclass(frozen=True, kw_only=True)
class Words(PassageRule):
    """`length` words each. Words are those of `luban.corpus.words`, where each Chinese, Japanese or Korean sign is one."""

    def spans(self, text: str) -> Iterator[Span]:
        found = words(text)
        cuts = Cuts(text, found.starts, found.ends)
        for first in range(0, len(found), self.length - self.overlap):
            yield cuts.span(first, min(first + self.length, len(found)))
            if first + self.length >= len(found):
                break


class Cuts:
    """Where a text is divided between its words: at white space where there is some, so that punctuation stays with the word
    that it touches; else directly before the next word.

    Args:
        starts, ends: (words,) int64, characters at which the words begin and end.
    """

    def __init__(self, text: str, starts: np.ndarray, ends: np.ndarray):
        self.text, self.starts, self.ends = text, starts, ends

    def span(self, first: int, last: int) -> Span:
        """The words from `first` to before `last`, with the punctuation beside them."""
        return Span(self._start(first), self._stop(last - 1))

    def _start(self, word: int) -> int:
        begin = int(self.ends[word - 1]) if word else 0
        start = int(self.starts[word])
        gap = self.text[begin:start]
        touching = gap.rsplit(None, 1)[-1] if gap and not gap[-1].isspace() else ""
        return start if word and len(touching) == len(gap) else start - len(touching)

    def _stop(self, word: int) -> int:
        end = int(self.ends[word])
        gap = self.text[end : int(self.starts[word + 1]) if word + 1 < len(self.starts) else len(self.text)]
        return end + (len(gap.split(None, 1)[0]) if gap and not gap[0].isspace() else 0)
