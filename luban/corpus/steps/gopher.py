"""Gopher's quality and repetition filters (Rae et al. 2021, appendix A.1.1 and table A1), for English web text.

Departure: the first occurrence of a duplicate n-gram isn't counted as repetition, only the later ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np

from luban.corpus.document import Document
from luban.corpus.tally import Tally
from luban.corpus.words import CODES, Runs, code_points, ngram_hashes, tokens

WORDS = (50, 100_000)  # minimum and maximum number of words in a document
MEAN_LENGTH = (3, 10)  # minimum and maximum mean word length in characters
SYMBOLS = 0.1  # maximum ratio of "#" to words, and of ellipses to words
BULLETS = 0.9  # maximum share of lines that begin with a bullet
ELLIPSES = 0.3  # maximum share of lines that end with an ellipsis
ALPHABETIC = 0.8  # minimum share of words that contain a letter
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # at least two different ones
BULLET_SIGNS = ("•", "-", "*", "‣", "◦", "⁃")
ELLIPSIS = ("...", "…")

# maximum shares: of lines or paragraphs that are duplicates, and of characters in them
DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
# n → maximum share of word characters in the most frequent n-gram, and in duplicate n-grams
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def gopher(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Drop documents that fail a rule, counted by the first rule they fail. Conversations pass."""
    for document in documents:
        if document.messages is None:
            found = tokens(document.text)
            reason = quality(document.text, found) or repetition(document.text, found)
            if reason:
                tally.drop(f"gopher: {reason}", document)
                continue
        yield document


def quality(text: str, found: Runs) -> str | None:
    """The first quality rule that `text`, whose words between white space are `found`, fails, or None."""
    count = len(found)
    if not WORDS[0] <= count <= WORDS[1]:
        return "number of words"
    if not MEAN_LENGTH[0] <= found.lengths.sum() / count <= MEAN_LENGTH[1]:
        return "word length"
    if max(text.count("#"), sum(map(text.count, ELLIPSIS))) / count > SYMBOLS:
        return "symbols"
    lines = list(filter(None, map(str.strip, text.splitlines())))
    if _share(text, lines, BULLET_SIGNS, str.startswith) > BULLETS:
        return "bullet points"
    if _share(text, lines, ELLIPSIS, str.endswith) > ELLIPSES:
        return "ellipses"
    if with_letter(text, found) / count < ALPHABETIC:
        return "alphabetic words"
    if _stop_words(found) < 2 and _stop_words(tokens(text.lower())) < 2:
        return "stop words"
    return None


def _share(text: str, lines: list[str], signs: tuple[str, ...], meets: Callable[[str, tuple[str, ...]], bool]) -> float:
    """Share of lines that begin or end with a sign; returns 0.0 early if the text has fewer signs than 0.3 × lines."""
    if sum(map(text.count, signs)) < ELLIPSES * len(lines):
        return 0.0
    return sum(meets(line, signs) for line in lines) / len(lines)


def with_letter(text: str, found: Runs) -> int:
    """Number of words that contain a letter."""
    letters = np.zeros(len(text) + 1, dtype=np.int64)
    np.cumsum(_letters()[code_points(text)], out=letters[1:])
    return int((letters[found.ends] > letters[found.starts]).sum())


@lru_cache(maxsize=1)
def _letters() -> np.ndarray:
    """(code points,) bool, true for letters."""
    return np.fromiter((chr(code).isalpha() for code in range(CODES)), dtype=bool, count=CODES)


def _stop_words(found: Runs) -> int:
    """Number of different stop words in the text."""
    return len(np.intersect1d(found.hashes, _stop_hashes()))


@lru_cache(maxsize=1)
def _stop_hashes() -> np.ndarray:
    return tokens(" ".join(STOP_WORDS)).hashes


def repetition(text: str, found: Runs) -> str | None:
    """The first repetition rule that `text`, whose words between white space are `found`, fails, or None."""
    lines = [line for line in text.splitlines() if line.strip()]
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    for name, parts, most, most_characters in (
        ("repeated lines", lines, DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS),
        ("repeated paragraphs", paragraphs, DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        if len(set(parts)) == len(parts):
            continue
        repeats = [(part, count - 1) for part, count in Counter(parts).items() if count > 1]
        if sum(count for _, count in repeats) > most * len(parts):
            return name
        if sum(len(part) * count for part, count in repeats) > most_characters * len(text):
            return name
    return _repeated_ngrams(found.hashes, found.lengths)


def _repeated_ngrams(hashes: np.ndarray, lengths: np.ndarray) -> str | None:
    """The first n-gram rule that fails, or None. A longer n-gram is no more frequent than the shorter ones in it, so the
    counts of 2-grams and of 5-grams decide for most texts."""
    ends = np.concatenate([[0], np.cumsum(lengths)])
    most_often = counts(hashes, 2)[0]
    for n, most in TOP_NGRAM.items():
        if most_often * longest(ends, n) > most and top_share(hashes, lengths, n) > most:
            return f"most frequent {n}-gram"
    least = min(DUPLICATE_NGRAMS.values())
    for n, most in DUPLICATE_NGRAMS.items():
        share = counts(hashes, n)[1] * longest(ends, n)
        share = duplicate_share(hashes, lengths, n) if share > least else share
        if share > most:
            return f"duplicate {n}-grams"
        if share <= least:
            break  # a longer duplicate n-gram consists of shorter ones, so its share cannot be larger
    return None


def counts(hashes: np.ndarray, n: int) -> tuple[int, int]:
    """(count of the most frequent n-gram, number of duplicate n-grams, first occurrences excluded); hashes (words,)."""
    grams = np.sort(ngram_hashes(hashes, n))
    if not len(grams):
        return 0, 0
    edges = np.flatnonzero(grams[1:] != grams[:-1])
    runs = np.diff(edges, prepend=-1, append=len(grams) - 1)
    return int(runs.max()), len(grams) - len(edges) - 1


def longest(ends: np.ndarray, n: int) -> float:
    """Share of word characters in the longest n consecutive words; `ends` (words + 1,) are cumulative lengths from 0."""
    return int((ends[n:] - ends[:-n]).max()) / int(ends[-1]) if len(ends) > n else 0.0


def top_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Share of word characters in the most frequent n-gram that occurs twice or more (ties: earliest)."""
    grams = ngram_hashes(hashes, n)
    if not len(grams):
        return 0.0
    _, first, occurrences = np.unique(grams, return_index=True, return_counts=True)
    best = np.lexsort((first, -occurrences))[0]
    if occurrences[best] < 2:
        return 0.0
    return float(occurrences[best] * lengths[first[best] : first[best] + n].sum() / lengths.sum())


def duplicate_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Share of word characters in duplicate n-grams (those that occurred before), each character counted once."""
    grams = ngram_hashes(hashes, n)
    if not len(grams):
        return 0.0
    _, first = np.unique(grams, return_index=True)
    duplicate = np.ones(len(grams), dtype=np.int64)
    duplicate[first] = 0
    edges = np.zeros(len(hashes) + 1, dtype=np.int64)  # +1 at the start of a duplicate n-gram, -1 after its end
    edges[: len(grams)] += duplicate
    edges[n : n + len(grams)] -= duplicate
    return float(lengths[np.cumsum(edges)[:-1] > 0].sum() / lengths.sum())
