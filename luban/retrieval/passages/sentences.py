"""Passages of whole sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from luban.corpus.words import words
from luban.retrieval.passages import PassageRule, Span
from luban.retrieval.passages.units import pack
from luban.retrieval.passages.words import Cuts

END = re.compile(
    r"""(?<![.!?])[.!?]++["'”’)\]]*+(?=\s)  # English and its like: marks, closing quotes, white space
    |[。！？…]++["”’」』）]*+                    # Chinese and Japanese, which write no space
    |\n(?=[ \t]*+\n)                        # a blank line ends headings and list items without a mark""",
    re.VERBOSE,
)
ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|al|No|Fig|Eq|Sec|Vol|pp|Inc|Ltd|Co|U\.S))\.$"
)
LONGEST_ABBREVIATION = 8  # characters before a full stop that are looked at


def sentences(text: str) -> list[tuple[int, int]]:
    """(start, stop) of the sentences of an English or Chinese text, without the white space around them."""
    found, start = [], 0
    for match in END.finditer(text):
        stop = match.end()
        if ABBREVIATION.search(text[max(stop - LONGEST_ABBREVIATION, start) : stop]):
            continue
        found.append(_trimmed(text, start, stop))
        start = stop
    found.append(_trimmed(text, start, len(text)))
    return [(start, stop) for start, stop in found if start < stop]


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    return start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


@dataclass(frozen=True, kw_only=True)
class Sentences(PassageRule):
    """Whole sentences of `length` words together at most; a longer sentence is divided between its words."""

    def spans(self, text: str) -> Iterator[Span]:
        yield from sentence_spans(text, self.length, self.overlap)


def sentence_spans(text: str, length: int, overlap: int) -> Iterator[Span]:
    """Runs of whole sentences of `length` words at most, each repeating at most `overlap` words of the one before it."""
    found = words(text)
    cuts = Cuts(text, found.starts, found.ends)
    units, sizes = [], []
    for start, stop in sentences(text):
        first, last = np.searchsorted(found.starts, [start, stop]).tolist()
        if last - first <= length:
            units.append((start, stop))
            sizes.append(last - first)
            continue
        for piece in range(first, last, length):
            span = cuts.span(piece, min(piece + length, last))
            units.append((max(span.start, start), min(span.stop, stop)))
            sizes.append(min(piece + length, last) - piece)
    for first, last in pack(sizes, length, overlap):
        if sum(sizes[first:last]):
            yield Span(units[first][0], units[last - 1][1])
