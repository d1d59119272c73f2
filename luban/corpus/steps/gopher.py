"""Gopher's quality and repetition filters (Rae et al. 2021, appendix A.1.1 and table A1), for English web text.

Departure: of a repeated n-gram the first occurrence counts as text, the further ones as repetition.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import numpy as np

from luban.corpus.document import Document
from luban.corpus.tally import Tally
from luban.corpus.words import CODES, Runs, code_points, ngram_hashes, tokens

WORDS = (50, 100_000)  # fewest and most
MEAN_LENGTH = (3, 10)  # characters a word
SYMBOLS = 0.1  # of "#" and of ellipses, for each word
BULLETS = 0.9  # of lines that begin with one
ELLIPSES = 0.3  # of lines that end with one
ALPHABETIC = 0.8  # of words with a letter, at least
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")  # two of them at least
BULLET_SIGNS = ("•", "-", "*", "‣", "◦", "⁃")
ELLIPSIS = ("...", "…")

DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # characters in the most frequent n-gram
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # characters in repeated n-grams


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
    """Share of lines that begin or end with a sign; 0 where even all signs of the text could not make a third of them."""
    if sum(map(text.count, signs)) < ELLIPSES * len(lines):
        return 0.0
    return sum(meets(line, signs) for line in lines) / len(lines)


def with_letter(text: str, found: Runs) -> int:
    """How many words have a letter."""
    letters = np.zeros(len(text) + 1, dtype=np.int64)
    np.cumsum(_letters()[code_points(text)], out=letters[1:])
    return int((letters[found.ends] > letters[found.starts]).sum())


@lru_cache(maxsize=1)
def _letters() -> np.ndarray:
    """(code points,) bool: which are letters."""
    return np.fromiter((chr(code).isalpha() for code in range(CODES)), dtype=bool, count=CODES)


def _stop_words(found: Runs) -> int:
    """How many different stop words occur."""
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
    """The first n-gram rule that is broken. A longer n-gram occurs no more often than the shorter ones in it, so that
    most texts are told by the counts of their pairs and of their 5-grams."""
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
            return f"repeated {n}-grams"
        if share <= least:
            break  # a longer repeated n-gram is made of shorter ones, so its share cannot be larger
    return None


def counts(hashes: np.ndarray, n: int) -> tuple[int, int]:
    """(occurrences of the most frequent n-gram, occurrences of all n-grams that are not the first of theirs)."""
    grams = np.sort(ngram_hashes(hashes, n))
    if not len(grams):
        return 0, 0
    edges = np.flatnonzero(grams[1:] != grams[:-1])
    runs = np.diff(edges, prepend=-1, append=len(grams) - 1)
    return int(runs.max()), len(grams) - len(edges) - 1


def longest(ends: np.ndarray, n: int) -> float:
    """Share of word characters in the longest run of n words; `ends` are (words + 1,) sums of lengths from 0 on."""
    return int((ends[n:] - ends[:-n]).max()) / int(ends[-1]) if len(ends) > n else 0.0


def top_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Share of word characters in the most frequent n-gram that occurs twice or more (its first, where several do)."""
    grams = ngram_hashes(hashes, n)
    if not len(grams):
        return 0.0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    best = np.lexsort((first, -counts))[0]
    if counts[best] < 2:
        return 0.0
    return float(counts[best] * lengths[first[best] : first[best] + n].sum() / lengths.sum())


def duplicate_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """Share of word characters in n-grams that occurred before, each character once."""
    grams = ngram_hashes(hashes, n)
    if not len(grams):
        return 0.0
    _, first = np.unique(grams, return_index=True)
    repeated = np.ones(len(grams), dtype=np.int64)
    repeated[first] = 0
    edges = np.zeros(len(hashes) + 1, dtype=np.int64)  # +1 where a repeated n-gram begins, -1 behind its end
    edges[: len(grams)] += repeated
    edges[n : n + len(grams)] -= repeated
    return float(lengths[np.cumsum(edges)[:-1] > 0].sum() / lengths.sum())
