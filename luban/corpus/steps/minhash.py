"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997; banding: Leskovec et al., ch. 3.4).

A document is a set of word 5-grams. 112 minima estimate the Jaccard similarity of two sets; two documents
meet if all 8 minima of one of 14 bands agree, which has probability 1 - (1 - s⁸)¹⁴ at similarity s. Those
that meet are compared by all minima.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from luban.core.seeding import generator
from luban.corpus.document import Document
from luban.corpus.tally import Tally
from luban.corpus.words import ngram_hashes, word_hashes, words

SHINGLE = 5  # words
BANDS, ROWS = 14, 8
MINIMA = BANDS * ROWS
THRESHOLD = 0.75  # estimated Jaccard similarity from which a document is a near-duplicate
CHUNK = 2048  # shingles hashed at a time, so that memory stays in cache

_RANDOM = generator(0, "minhash")
_FACTORS = _RANDOM.integers(1, 1 << 63, MINIMA, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # odd: a bijection
_OFFSETS = _RANDOM.integers(0, 1 << 63, MINIMA, dtype=np.uint64)


def minhash(documents: Iterable[Document], tally: Tally, threshold: float = THRESHOLD) -> Iterator[Document]:
    """Drop documents that nearly repeat an earlier one; texts of fewer than 5 words are left to exact dedup.

    Memory: 448 bytes of minima and 14 table entries a kept document.
    """
    tables: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    kept: list[np.ndarray] = []
    for document in documents:
        minima = signature(document.text)
        if minima is None:
            yield document
            continue
        keys = [minima[band * ROWS : (band + 1) * ROWS].tobytes() for band in range(BANDS)]
        met = {other for table, key in zip(tables, keys, strict=True) for other in table.get(key, ())}
        if any((kept[other] == minima).mean() >= threshold for other in met):
            tally.drop("minhash", document)
            continue
        for table, key in zip(tables, keys, strict=True):
            table.setdefault(key, []).append(len(kept))
        kept.append(minima)
        yield document


def signature(text: str) -> np.ndarray | None:
    """The (112,) uint32 minima of a text's shingles, or None where it has fewer than 5 words."""
    hashes = shingles(text)
    if not len(hashes):
        return None
    minima = np.full(MINIMA, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(hashes), CHUNK):
        part = hashes[start : start + CHUNK, None] * _FACTORS + _OFFSETS  # (shingles, minima), modulo 2⁶⁴
        np.minimum(minima, (part >> np.uint64(32)).astype(np.uint32).min(axis=0), out=minima)
    return minima


def shingles(text: str) -> np.ndarray:
    """Distinct 64-bit hashes of the text's word 5-grams."""
    return np.unique(ngram_hashes(word_hashes(words(text)), SHINGLE))
