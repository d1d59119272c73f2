"""BM25 over a few texts that are in memory: names of columns, passages of a conversation. Corpora have an index instead.

Robertson and Zaragoza 2009, equation 3.15 with the idf of 3.3 plus one, as Lucene has it, so that no score is negative.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(
    r"[a-z0-9]+|[^\W_a-z0-9]", re.IGNORECASE
)  # runs of Latin letters and digits; other scripts sign by sign


def words(text: str) -> list[str]:
    """Words of a text in lower case: runs of Latin letters or digits, names cut at underscores and capitals, endings of
    plurals taken off, other scripts sign by sign."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return [_stem(word) for word in WORD.findall(apart.lower())]


def _stem(word: str) -> str:
    """An English noun without the ending of its plural."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


class BM25:
    """Scores texts for a query.

    Args:
        texts: N of them, each as its words.
        k1: how soon further occurrences of a word stop counting.
        b: how much long texts are marked down, 0 to 1.
    """

    def __init__(self, texts: Sequence[Sequence[str]], *, k1: float = 1.2, b: float = 0.75):
        self.counts, self.k1, self.b = [Counter(text) for text in texts], k1, b
        self.lengths = [len(text) for text in texts]
        self.mean = sum(self.lengths) / len(texts) if texts else 0.0
        held = Counter(word for count in self.counts for word in count)
        self.idf = {word: math.log(1 + (len(texts) - n + 0.5) / (n + 0.5)) for word, n in held.items()}

    def scores(self, query: Sequence[str]) -> list[float]:
        """The score of each text; a word that the query repeats counts once."""
        asked = [word for word in dict.fromkeys(query) if word in self.idf]
        return [self._score(asked, count, length) for count, length in zip(self.counts, self.lengths, strict=True)]

    def _score(self, asked: Sequence[str], count: Counter[str], length: int) -> float:
        norm = self.k1 * (1 - self.b + self.b * length / (self.mean or 1))
        return sum(self.idf[word] * count[word] * (self.k1 + 1) / (count[word] + norm) for word in asked)
