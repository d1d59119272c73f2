"""13-gram deduplication with a Bloom filter (Bloom 1970): drop what mostly repeats earlier text, from any documents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import DropStep
from luban.corpus.words import mix, ngram_hashes, words

GRAM = 13  # words
SAMPLE = 4  # one n-gram in so many is looked at, chosen by its hash
FEWEST = 4  # sampled n-grams of a document that can be judged
REPEATED = 0.8  # share of n-grams met before from which a document is dropped
BITS, HASHES = 10, 7  # bits for each n-gram and bits set by it: false positives of 0.8% an n-gram


class Bloom(DropStep):
    """Drop documents of whose 13-grams four in five stood in documents kept before; conversations pass.

    The filter takes 10 to 20 bits for each sampled n-gram.
    """

    reason = "bloom"

    def fingerprint(self, document: Document) -> np.ndarray:
        """(sampled n-grams,) uint64, each once."""
        return sampled_ngrams(document, GRAM, SAMPLE)

    def duplicates(self, shards: Sequence[Ragged]) -> np.ndarray:
        """In document order; a dropped document leaves nothing in the filter."""
        total = sum(len(shard.values) for shard in shards)
        size = 1 << max(int(np.ceil(np.log2(max(total * BITS, 64)))), 6)
        bits = np.zeros(size // 8, dtype=np.uint8)
        dropped = []
        for shard in shards:
            for grams in shard:
                places = _places(grams, size)
                cells, masks = places >> np.uint64(3), np.uint8(1) << (places & np.uint64(7)).astype(np.uint8)
                met = ((bits[cells] & masks) != 0).all(axis=0)
                drop = len(grams) >= FEWEST and met.mean() >= REPEATED
                dropped.append(drop)
                if not drop:
                    np.bitwise_or.at(bits, cells.ravel(), masks.ravel())
        return np.array(dropped, dtype=bool)


def _places(grams: np.ndarray, size: int) -> np.ndarray:
    """(HASHES, n-grams) uint64: bits of each n-gram, by double hashing (Kirsch and Mitzenmacher 2006)."""
    step = mix(grams) | np.uint64(1)
    return (grams + np.arange(HASHES, dtype=np.uint64)[:, None] * step) & np.uint64(size - 1)


def sampled_ngrams(document: Document, n: int, one_in: int) -> np.ndarray:
    """(any,) uint64: the document's different n-grams of words that the sample takes; none of a conversation."""
    if document.messages is not None:
        return np.zeros(0, np.uint64)
    grams = ngram_hashes(words(document.text).hashes, n)
    return np.unique(mix(grams[grams % np.uint64(one_in) == 0]))
