"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997; banding: Leskovec et al., ch. 3.4).

A document is a set of word 5-grams. 112 minima estimate the Jaccard similarity of two sets; two documents
meet if all 8 minima of one of 14 bands agree, which has probability 1 - (1 - s⁸)¹⁴ at similarity s. Those
that meet are compared by all minima.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from luban.core.seeding import generator
from luban.corpus.document import Document
from luban.corpus.tally import Tally
from luban.corpus.words import words

SHINGLE = 5  # words
BANDS, ROWS = 14, 8
MINIMA = BANDS * ROWS
THRESHOLD = 0.75  # estimated Jaccard similarity from which a document is a near-duplicate
CHUNK = 2048  # shingles hashed at a time, so that memory stays in cache
CACHE = 1 << 20  # words whose hash is kept

_RANDOM = generator(0, "minhash")
_FACTORS = _RANDOM.integers(1, 1 << 63, MINIMA, dtype=np.uint64) * np.uint64(2) + np.uint64(1)  # odd: a bijection
_OFFSETS = _RANDOM.integers(0, 1 << 63, MINIMA, dtype=np.uint64)
_PLACES = _RANDOM.integers(1, 1 << 63, SHINGLE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_word_hashes: dict[str, int] = {}


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
    hashes = np.array([_word_hash(word) for word in words(text)], dtype=np.uint64)
    if len(hashes) < SHINGLE:
        return hashes[:0]
    count = len(hashes) - SHINGLE + 1
    mixed = np.zeros(count, dtype=np.uint64)
    for place in range(SHINGLE):
        mixed += hashes[place : place + count] * _PLACES[place]
    return np.unique(_mix(mixed))


def _word_hash(word: str) -> int:
    found = _word_hashes.get(word)
    if found is None:
        if len(_word_hashes) >= CACHE:
            _word_hashes.clear()
        found = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        _word_hashes[word] = found
    return found


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
