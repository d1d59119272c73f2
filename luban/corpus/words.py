"""Words and their hashes, for filters and fingerprints. Words are runs of letters and digits; each Chinese, Japanese or Korean sign is one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

from luban.core.seeding import generator

WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]+"
)


_SPACES = {code: " " for code in range(128) if not re.match(r"\w", chr(code))}


def words(text: str) -> list[str]:
    """The words of `text` in order, in lower case."""
    lower = text.lower()
    return lower.translate(_SPACES).split() if lower.isascii() else WORD.findall(lower)  # the same, five times as fast


CACHE = 1 << 20  # words whose hash is kept
LONGEST = 16  # words of the longest n-gram
PLACES = generator(0, "ngrams").integers(1, 1 << 63, LONGEST, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


class _Hashes(dict[str, int]):
    """Word → 64-bit hash, computed when first asked for."""

    def __missing__(self, word: str) -> int:
        if len(self) >= CACHE:
            self.clear()
        found = int.from_bytes(hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8).digest(), "little")
        self[word] = found
        return found


_hashes = _Hashes()


def word_hashes(found: Sequence[str]) -> np.ndarray:
    """(words,) uint64: a hash of each word, the same on every machine."""
    return np.fromiter(map(_hashes.__getitem__, found), dtype=np.uint64, count=len(found))


def ngram_hashes(hashes: np.ndarray, n: int) -> np.ndarray:
    """(words - n + 1,) uint64: a hash of every run of `n` words, n ≤ 16; empty where there are fewer."""
    count = max(len(hashes) - n + 1, 0)
    mixed = np.zeros(count, dtype=np.uint64)
    for place in range(n):
        mixed += hashes[place : place + count] * PLACES[place]
    return mix(mixed)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
