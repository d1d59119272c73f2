"""Words and their hashes, for filters and fingerprints, by array operations on a text's code points.

Words are runs of letters and digits in lower case, each Chinese, Japanese or Korean sign one by itself, always with the
combining marks that follow (vowel signs and accents: Unicode's category M); tokens are what stands between white space. A run's hash is the polynomial of its code points over the integers modulo 2⁶⁴ (Karp and Rabin
1987), taken from prefix sums and mixed, so that it is the same in every text and on every machine.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from luban.core.errors import ArtifactError
from luban.core.seeding import generator

SIGNS = ((0x3040, 0x3100), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7B0))  # of scripts taken sign by sign
OUTSIDE, INSIDE, ALONE, MARK = 0, 1, 2, 3  # classes of a code point; a mark is of the class of what it follows
CODES = 0x110000  # code points there are
CHUNK = 1 << 16  # code points worked on at a time; a longer run is cut
LONGEST = 16  # words of the longest n-gram
FORMAT = 3  # of artifacts that hold hashes of words: counts up when words or hashes change
PLACES = generator(0, "ngrams").integers(1, 1 << 63, LONGEST, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_BASE = int(generator(0, "words").integers(1 << 61, 1 << 62)) * 2 + 1  # odd, so that it has an inverse


@dataclass(frozen=True)
class Runs:
    """Where a text's words or tokens stand, and their hashes; as many rows in each array."""

    starts: np.ndarray  # (runs,) int64, first code point
    ends: np.ndarray  # (runs,) int64, behind the last
    hashes: np.ndarray  # (runs,) uint64

    @property
    def lengths(self) -> np.ndarray:
        """(runs,) int64 code points."""
        return self.ends - self.starts

    def __len__(self) -> int:
        return len(self.starts)


def words(text: str) -> Runs:
    """The words of `text`, compared in lower case."""
    return _runs(lowered(text), _word_classes())


def tokens(text: str) -> Runs:
    """The pieces of `text` between white space, as they are."""
    return _runs(text, _token_classes())


def check_hashes(path: str | Path, format: int) -> None:
    """Raise ArtifactError where the artifact at `path` holds hashes of another version."""
    if format != FORMAT:
        raise ArtifactError(
            f"{path} was learned when words were hashed in another way (format {format}, now {FORMAT}): make it again"
        )


def lowered(text: str) -> str:
    """`text` in lower case, as long as before: the few letters whose lower case is longer stay."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(low if len(low := letter.lower()) == 1 else letter for letter in text)


def code_points(text: str) -> np.ndarray:
    """(characters,) uint8 for ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode(), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _runs(text: str, classes: np.ndarray) -> Runs:
    codes = code_points(text)
    found, first = [], 0
    while first < len(codes):
        part = codes[first : first + CHUNK]
        starts, ends, hashes = _part(part, classes[part])
        size = len(part)
        if first + size < len(codes) and len(starts) and ends[-1] == size and starts[-1] > 0:
            size = int(starts[-1])  # the last run may go on, so the next part begins with it
            starts, ends, hashes = starts[:-1], ends[:-1], hashes[:-1]
        found.append((starts + first, ends + first, hashes))
        first += size
    if len(found) == 1:
        return Runs(*found[0])
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64))
    return Runs(*(np.concatenate(column) for column in zip(empty, *found, strict=True)))


def _part(codes: np.ndarray, kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, ends, hashes) of the runs among at most CHUNK code points."""
    joined = np.zeros(len(kinds) + 1, dtype=bool)  # whether a code point belongs to the run of the one before it
    marks = kinds == MARK
    if marks.any():
        before = np.maximum.accumulate(np.where(marks, -1, np.arange(len(kinds))))  # the last that is no mark
        kinds = np.where(before < 0, OUTSIDE, kinds[np.maximum(before, 0)])
        joined[:-1] = marks & (kinds != OUTSIDE)
    inside = np.zeros(len(kinds) + 1, dtype=bool)
    inside[:-1] = kinds == INSIDE
    joined[1:-1] |= inside[1:-1] & inside[:-2]
    taken = kinds != OUTSIDE
    starts = np.flatnonzero(taken & ~joined[:-1])
    ends = np.flatnonzero(taken & ~joined[1:]) + 1
    powers, inverses = _powers(CHUNK)
    sums = np.zeros(len(codes) + 1, dtype=np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    return starts, ends, mix((sums[ends] - sums[starts]) * inverses[starts])


@lru_cache(maxsize=1)
def _powers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """(size,) powers of the base and of its inverse, modulo 2⁶⁴."""
    both = (_BASE, pow(_BASE, -1, 1 << 64))
    rows = [np.cumprod(np.array([1, *[base] * (size - 1)], dtype=np.uint64), dtype=np.uint64) for base in both]
    return rows[0], rows[1]


@lru_cache(maxsize=1)
def _word_classes() -> np.ndarray:
    """(CODES,) uint8: the class of every code point for words."""
    every = [chr(code) for code in range(CODES)]
    classes = np.fromiter((c == "_" or c.isalnum() for c in every), dtype=np.uint8, count=CODES)  # INSIDE or OUTSIDE
    for low, high in SIGNS:
        classes[low:high] = ALONE
    classes[np.fromiter((unicodedata.category(c)[0] == "M" for c in every), dtype=bool, count=CODES)] = MARK
    return classes


@lru_cache(maxsize=1)
def _token_classes() -> np.ndarray:
    """(CODES,) uint8: the class of every code point for tokens."""
    return np.fromiter((not chr(code).isspace() for code in range(CODES)), dtype=np.uint8, count=CODES)


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
