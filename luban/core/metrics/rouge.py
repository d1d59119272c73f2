"""ROUGE-N and ROUGE-L between two texts (Lin 2004): F1 of shared n-grams, and of the longest common subsequence of words.

Words are runs of ASCII letters and digits in lower case, as in Google's rouge-score without its stemmer; letters of other
scripts, which that drops, count as words as well, each Chinese, Japanese or Korean sign by itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

WORDS = re.compile(r"[a-z0-9]+|[぀-ヿ㐀-䶿一-鿿가-힯]|(?:(?![぀-ヿ㐀-䶿一-鿿가-힯])[^\W\x00-\x7f])+")


def rouge_words(text: str) -> list[str]:
    """The words that are compared."""
    return WORDS.findall(text.lower())


def rouge_n(text: str, reference: str, n: int) -> float:
    """F1 of the n-grams of words that two texts share, each as often as both have it."""
    found, wanted = (_ngrams(rouge_words(each), n) for each in (text, reference))
    return _f1(sum((found & wanted).values()), sum(found.values()), sum(wanted.values()))


def rouge_l(text: str, reference: str) -> float:
    """F1 of the longest common subsequence of the words of two texts."""
    return rouge_l_words(rouge_words(text), rouge_words(reference))


def rouge_l_words(words: Sequence[str], reference: Sequence[str]) -> float:
    """`rouge_l` of texts that are words already."""
    return _f1(longest_common_subsequence(words, reference), len(words), len(reference))


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits of whole numbers (Hyyrö 2004): one addition a word of `second`."""
    masks: dict[str, int] = {}
    for place, word in enumerate(first):
        masks[word] = masks.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        matched = row & masks.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(first) - row.bit_count()


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f1(shared: int, found: int, wanted: int) -> float:
    return 2 * shared / (found + wanted) if shared else 0.0


class RougePool:
    """Texts that new ones are compared with by ROUGE-L, as Self-Instruct keeps its instructions apart (Wang et al. 2023)."""

    def __init__(self) -> None:
        self.words: list[list[str]] = []
        self.sets: list[Counter[str]] = []

    def add(self, text: str) -> None:
        """Put a text into the pool."""
        words = rouge_words(text)
        self.words.append(words)
        self.sets.append(Counter(words))

    def nearest(self, text: str, limit: float = 0.0) -> tuple[float, int]:
        """(highest ROUGE-L with a text of the pool, its place); (0, -1) where none reaches `limit`.

        A text whose shared words alone can't reach what is wanted isn't compared in order.
        """
        words = rouge_words(text)
        counted = Counter(words)
        best, place = 0.0, -1
        for at, (other, their) in enumerate(zip(self.words, self.sets, strict=True)):
            most = _f1(sum((counted & their).values()), len(words), len(other))
            if most > best and most >= limit:
                score = rouge_l_words(words, other)
                if score > best and score >= limit:
                    best, place = score, at
        return best, place


def mean_rouge(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Mean ROUGE-1, ROUGE-2 and ROUGE-L of (text, reference) pairs. Raises ValueError for none."""
    if not pairs:
        raise ValueError("ROUGE needs at least one pair of texts")
    return {
        "rouge1": float(np.mean([rouge_n(a, b, 1) for a, b in pairs])),
        "rouge2": float(np.mean([rouge_n(a, b, 2) for a, b in pairs])),
        "rougeL": float(np.mean([rouge_l(a, b) for a, b in pairs])),
    }
