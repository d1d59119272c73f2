"""Gopher's quality and repetition filters (Rae et al. 2021, appendix A.1.1 and table A1), for English web text.

Departure: of a repeated n-gram the first occurrence counts as text, the further ones as repetition.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from luban.corpus.document import Document
from luban.corpus.tally import Tally
from luban.corpus.words import ngram_hashes, word_hashes

WORDS = (50, 100_000)  # fewest and most
MEAN_LENGTH = (3, 10)  # characters a word
SYMBOLS = 0.1  # of "#" and of ellipses, for each word
BULLETS = 0.9  # of lines that begin with one
ELLIPSES = 0.3  # of lines that end with one
ALPHABETIC = 0.8  # of words with a letter, at least
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))  # two of them at least
BULLET_SIGNS = ("•", "-", "*", "‣", "◦", "⁃")
ELLIPSIS = ("...", "…")
ASCII_WITHOUT_LETTER = re.compile(r"(?<!\S)[^\sA-Za-z]+(?!\S)")

DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # characters in the most frequent n-gram
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # characters in repeated n-grams


def gopher(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Drop documents that fail a rule, counted by the first rule they fail. Conversations pass."""
    for document in documents:
        words = document.text.split()
        passes = document.messages is not None
        reason = None if passes else quality(document.text, words) or repetition(document.text, words)
        if reason:
            tally.drop(f"gopher: {reason}", document)
            continue
        yield document


def quality(text: str, words: list[str]) -> str | None:
    """The first quality rule that `text`, whose words are `words`, fails, or None."""
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return "number of words"
    if not MEAN_LENGTH[0] <= sum(map(len, words)) / len(words) <= MEAN_LENGTH[1]:
        return "word length"
    if max(text.count("#"), sum(map(text.count, ELLIPSIS))) / len(words) > SYMBOLS:
        return "symbols"
    if sum(line.startswith(BULLET_SIGNS) for line in lines) / len(lines) > BULLETS:
        return "bullet points"
    if sum(line.endswith(ELLIPSIS) for line in lines) / len(lines) > ELLIPSES:
        return "ellipses"
    if (len(words) - _without_letter(text, words)) / len(words) < ALPHABETIC:
        return "alphabetic words"
    different = set(words)
    if len(STOP_WORDS & different) < 2 and len(STOP_WORDS & set(map(str.lower, different))) < 2:
        return "stop words"
    return None


def _without_letter(text: str, words: list[str]) -> int:
    """How many words have no letter."""
    if text.isascii():
        return len(ASCII_WITHOUT_LETTER.findall(text))
    return sum(not any(map(str.isalpha, word)) for word in words if not word.isalpha())


def repetition(text: str, words: list[str]) -> str | None:
    """The first repetition rule that `text`, whose words are `words`, fails, or None."""
    lines = [line for line in text.splitlines() if line.strip()]
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    for name, parts, most, most_characters in (
        ("repeated lines", lines, DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS),
        ("repeated paragraphs", paragraphs, DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS),
    ):
        repeats = [(part, count - 1) for part, count in Counter(parts).items() if count > 1]
        if sum(count for _, count in repeats) > most * len(parts):
            return name
        if sum(len(part) * count for part, count in repeats) > most_characters * len(text):
            return name
    hashes, lengths = word_hashes(words), np.fromiter(map(len, words), np.int64, len(words))
    for n, most in TOP_NGRAM.items():
        if bounds(hashes, lengths, n)[0] > most and top_share(hashes, lengths, n) > most:
            return f"most frequent {n}-gram"
    for n, most in DUPLICATE_NGRAMS.items():
        least = min(DUPLICATE_NGRAMS.values())
        share = bounds(hashes, lengths, n)[1]
        share = duplicate_share(hashes, lengths, n) if share > least else share
        if share > most:
            return f"repeated {n}-grams"
        if share <= least:
            break  # a longer repeated n-gram is made of shorter ones, so its share cannot be larger
    return None


def bounds(hashes: np.ndarray, lengths: np.ndarray, n: int) -> tuple[float, float]:
    """Bounds, cheap to compute, above `top_share` and `duplicate_share`: as if every n-gram were the longest."""
    grams = np.sort(ngram_hashes(hashes, n))
    edges = np.flatnonzero(grams[1:] != grams[:-1]) if len(grams) else grams
    repeated = len(grams) - len(edges) - 1  # occurrences that are not the first
    if repeated <= 0:
        return 0.0, 0.0
    ends = np.concatenate([[0], np.cumsum(lengths)])
    longest = int((ends[n:] - ends[:-n]).max()) / int(ends[-1])
    runs = np.diff(edges, prepend=-1, append=len(grams) - 1)
    return float(runs.max() * longest), float(repeated * longest)


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
