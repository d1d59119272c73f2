"""Gopher's quality and repetition filters (Rae et al. 2021, appendix A.1.1 and table A1), for English web text.

Departure: of a repeated n-gram the first occurrence counts as text, the further ones as repetition.
"""

from __future__ import annotations

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

DUPLICATE_LINES, DUPLICATE_LINE_CHARACTERS = 0.30, 0.20
DUPLICATE_PARAGRAPHS, DUPLICATE_PARAGRAPH_CHARACTERS = 0.30, 0.20
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}  # characters in the most frequent n-gram
DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # characters in repeated n-grams


def gopher(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Drop documents that fail a rule, counted by the first rule they fail. Conversations pass."""
    for document in documents:
        reason = None if document.messages is not None else quality(document.text) or repetition(document.text)
        if reason:
            tally.drop(f"gopher: {reason}", document)
            continue
        yield document


def quality(text: str) -> str | None:
    """The first quality rule that `text` fails, or None."""
    words, lines = text.split(), [line.strip() for line in text.splitlines() if line.strip()]
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
    if _with_letter(words) / len(words) < ALPHABETIC:
        return "alphabetic words"
    if len(STOP_WORDS & set(text.lower().split())) < 2:
        return "stop words"
    return None


def _with_letter(words: list[str]) -> int:
    """How many words have a letter; those of letters only, most of them, are counted without a loop."""
    others = [word for word in words if not word.isalpha()]
    return len(words) - len(others) + sum(any(map(str.isalpha, word)) for word in others)


def repetition(text: str) -> str | None:
    """The first repetition rule that `text` fails, or None."""
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
    words = text.split()
    hashes, lengths = word_hashes(words), np.array([len(word) for word in words])
    for n, most in TOP_NGRAM.items():
        if top_share(hashes, lengths, n) > most:
            return f"most frequent {n}-gram"
    for n, most in DUPLICATE_NGRAMS.items():
        share = duplicate_share(hashes, lengths, n)
        if share > most:
            return f"repeated {n}-grams"
        if share <= min(DUPLICATE_NGRAMS.values()):
            break  # a longer repeated n-gram is made of shorter ones, so its share cannot be larger
    return None


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
