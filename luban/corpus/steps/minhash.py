"""Near-duplicates by MinHash and locality-sensitive hashing (Broder 1997; banding: Leskovec et al., ch. 3.4).

A document is a set of word 5-grams. 112 minima estimate the Jaccard similarity of two sets; two documents
meet if all 8 minima of one of 14 bands agree, which has probability 1 - (1 - s⁸)¹⁴ at similarity s. Those
that meet are compared by all minima. A word of a conversation counts as another one in another role.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from luban.core.seeding import generator
from luban.corpus.conversation import turns
from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import DropStep
from luban.corpus.words import PLACES, mix, ngram_hashes, words

SHINGLE = 5  # words
BANDS, ROWS = 14, 8
MINIMA = BANDS * ROWS
THRESHOLD = 0.75  # estimated Jaccard similarity from which a document is a near-duplicate
CHUNK = 256  # shingles hashed at a time, so that memory stays in cache

_RANDOM = generator(0, "minhash")
_FACTORS = _RANDOM.integers(0, 1 << 31, MINIMA, dtype=np.uint32) * np.uint32(2) + np.uint32(1)  # odd: a bijection
_OFFSETS = _RANDOM.integers(0, 1 << 32, MINIMA, dtype=np.uint32)
_SCRATCH = np.empty((CHUNK, MINIMA), dtype=np.uint32)


class MinHash(DropStep):
    """Drop documents that nearly repeat an earlier kept one; texts of fewer than 5 words are left to exact dedup.

    Minima stay in their files; the decision takes about 80 bytes of memory a document.
    """

    reason = "minhash"

    def fingerprint(self, document: Document) -> np.ndarray:
        """(56,) uint64: the 112 minima; none for a short text."""
        minima = signature_of(shingles(document))
        return np.zeros(0, np.uint64) if minima is None else minima.view(np.uint64)

    def duplicates(self, shards: Sequence[Ragged]) -> np.ndarray:
        """In document order, each document that meets a kept one is compared with it."""
        has = np.concatenate([shard.lengths > 0 for shard in shards])
        minima = _Minima(shards)
        meetings = _meetings(minima)
        kept: dict[int, list[int]] = defaultdict(list)  # meeting place → documents kept that came there
        dropped = np.zeros(minima.count, dtype=bool)
        for document in np.flatnonzero((meetings >= 0).any(axis=1)).tolist():
            places = [int(place) for place in meetings[document] if place >= 0]
            others = sorted({other for place in places for other in kept[place]})
            if others and (minima.take(others) == minima.take([document])).mean(axis=1).max() >= THRESHOLD:
                dropped[document] = True
                continue
            for place in places:
                kept[place].append(document)
        result = np.zeros(len(has), dtype=bool)
        result[has] = dropped
        return result


class _Minima:
    """The minima of all shards as if they were one (documents, 112) uint32 table."""

    def __init__(self, shards: Sequence[Ragged]):
        self.tables = [shard.values.view(np.uint32).reshape(-1, MINIMA) for shard in shards]
        self.starts = np.cumsum([0, *map(len, self.tables)])
        self.count = int(self.starts[-1])

    def take(self, rows: Sequence[int]) -> np.ndarray:
        """(rows, 112)."""
        tables = np.searchsorted(self.starts, rows, side="right") - 1
        return np.stack([self.tables[t][row - self.starts[t]] for t, row in zip(tables, rows, strict=True)])

    def band(self, band: int) -> np.ndarray:
        """(documents,) uint64: a hash of the band's 8 minima."""
        columns = slice(band * ROWS, (band + 1) * ROWS)
        return np.concatenate([mix((t[:, columns] * PLACES[:ROWS]).sum(axis=1)) for t in self.tables])


def _meetings(minima: _Minima) -> np.ndarray:
    """(documents, bands) int32: the place where a document meets others in a band, -1 where it is alone."""
    places = np.full((minima.count, BANDS), -1, dtype=np.int32)
    first = 0
    for band in range(BANDS):
        _, group, sizes = np.unique(minima.band(band), return_inverse=True, return_counts=True)
        number = np.where(sizes > 1, np.cumsum(sizes > 1) - 1 + first, -1).astype(np.int32)
        places[:, band] = number[group]
        first += int((sizes > 1).sum())
    return places


def signature(text: str) -> np.ndarray | None:
    """The (112,) uint32 minima of a text's shingles, or None where it has fewer than 5 words."""
    return signature_of(ngram_hashes(words(text).hashes, SHINGLE))


def signature_of(hashes: np.ndarray) -> np.ndarray | None:
    """The (112,) uint32 minima of (shingles,) uint64 hashes, or None where there are none."""
    if not len(hashes):
        return None
    short = (hashes >> np.uint64(32)).astype(np.uint32)
    minima = np.full(MINIMA, np.iinfo(np.uint32).max, dtype=np.uint32)
    for start in range(0, len(short), CHUNK):
        part = short[start : start + CHUNK, None]
        scratch = _SCRATCH[: len(part)]
        np.multiply(part, _FACTORS, out=scratch)  # (shingles, minima), modulo 2³²
        np.add(scratch, _OFFSETS, out=scratch)
        np.minimum(minima, scratch.min(axis=0), out=minima)
    return minima


def shingles(document: Document) -> np.ndarray:
    """(shingles,) uint64: hashes of the document's word 5-grams, in order; words of a conversation with their roles."""
    if document.messages is None:
        return ngram_hashes(words(document.text).hashes, SHINGLE)
    hashed = [mix(words(text).hashes + _role(role)) for role, text in turns(document)]
    return ngram_hashes(np.concatenate(hashed), SHINGLE)


def _role(role: str) -> np.uint64:
    return mix(words(role).hashes).sum(dtype=np.uint64)
