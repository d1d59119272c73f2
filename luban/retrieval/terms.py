"""The terms of a text for BM25: words in lower case, and pairs of neighbouring Chinese, Japanese or Korean signs.

A language that writes no spaces is segmented by its pairs of signs (as Lucene's CJKAnalyzer does), each sign by itself
besides, so that queries of one sign are found. Terms are 64-bit hashes (`luban.corpus.words`), the same on every machine.
"""

from __future__ import annotations

import numpy as np

from luban.corpus.words import FORMAT as WORDS_FORMAT
from luban.corpus.words import SIGNS, code_points, ngram_hashes, words

FORMAT = f"{WORDS_FORMAT}.1"  # of the terms that an index holds


def terms(text: str) -> np.ndarray:
    """(terms,) uint64 of a text, each as often as it occurs."""
    found = words(text)
    if text.isascii() or len(found) < 2:
        return found.hashes
    firsts = code_points(text)[found.starts]
    signs = np.zeros(len(found), dtype=bool)
    for low, high in SIGNS:
        signs |= (firsts >= low) & (firsts < high)
    pairs = signs[:-1] & signs[1:] & (found.ends[:-1] == found.starts[1:])
    return np.concatenate([found.hashes, ngram_hashes(found.hashes, 2)[pairs]])
