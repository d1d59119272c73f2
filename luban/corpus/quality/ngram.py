"""A word 3-gram language model with Witten-Bell interpolation (Witten and Bell 1991), for perplexities as in CCNet.

p(w | h) = (c(h w) + t(h) · p(w | h')) / (c(h) + t(h)): c counts, t(h) is how many different words followed h, h' is
h without its first word; below single words every word of the vocabulary and one unknown are equally likely.
n-grams are 64-bit hashes in sorted arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from luban.core.artifact import ArtifactWriter, Parent, open_artifact
from luban.core.errors import DataError
from luban.corpus.words import FORMAT, check_hashes, ngram_hashes, words

ORDER = 3
HELD = 1 << 22  # n-grams counted before they are merged into the tables
KIND = "ngram-model"


@dataclass
class Table:
    """Sorted keys and what was counted of each."""

    keys: np.ndarray  # (n,) uint64
    counts: np.ndarray  # (n,) int64

    @classmethod
    def of(cls, keys: np.ndarray) -> Table:
        """Occurrences counted."""
        found, counts = np.unique(keys, return_counts=True)
        return cls(found, counts.astype(np.int64))

    def merged(self, other: Table) -> Table:
        """Both tables' counts."""
        keys, places = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.zeros(len(keys), dtype=np.int64)
        np.add.at(counts, places, np.concatenate([self.counts, other.counts]))
        return Table(keys, counts)

    def look(self, keys: np.ndarray, *beside: np.ndarray) -> list[np.ndarray]:
        """(n,) int64 counts of these keys, and what stands `beside` the counts; 0 for those that are not here."""
        if not len(self.keys):
            return [np.zeros(len(keys), dtype=np.int64)] * (1 + len(beside))
        places = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        here = self.keys[places] == keys
        return [np.where(here, column[places], 0) for column in (self.counts, *beside)]


EMPTY = np.zeros(0, np.uint64)


class NgramModel:
    """Counts of n-grams of every order, of their contexts, and of the words that followed each context."""

    def __init__(self, grams: list[Table], contexts: list[Table], followers: list[Table]):
        self.grams, self.contexts, self.followers = grams, contexts, followers  # one of each an order, 1 to ORDER
        self.vocabulary = len(grams[0].keys) + 1  # and the unknown word

    @classmethod
    def train(cls, texts: Iterable[str]) -> NgramModel:
        """Count the n-grams of all texts. Memory grows with the number of different ones.

        Raises:
            DataError: there is no word.
        """
        grams = [Table(EMPTY, EMPTY.astype(np.int64)) for _ in range(ORDER)]
        # (n-gram, its context), each once
        pairs: list[np.ndarray] = [np.zeros((0, 2), np.uint64) for _ in range(ORDER)]
        contexts = [Table(EMPTY, EMPTY.astype(np.int64)) for _ in range(ORDER)]
        held: list[list[np.ndarray]] = [[] for _ in range(ORDER)]

        def merge() -> None:
            for order in range(ORDER):
                found = np.concatenate([np.zeros((0, 2), np.uint64), *held[order]])
                grams[order] = grams[order].merged(Table.of(found[:, 0]))
                contexts[order] = contexts[order].merged(Table.of(found[:, 1]))
                both = np.concatenate([pairs[order], found])
                pairs[order] = both[np.unique(both[:, 0], return_index=True)[1]]
                held[order] = []

        size = 0
        for text in texts:
            hashes = words(text).hashes
            for order in range(ORDER):
                held[order].append(np.stack(_grams(hashes, order + 1), axis=1))
            size += len(hashes)
            if size >= HELD:
                merge()
                size = 0
        merge()
        if not len(grams[0].keys):
            raise DataError("an n-gram model cannot be trained on nothing: the texts hold no word")
        return cls(grams, contexts, [Table.of(pair[:, 1]) for pair in pairs])

    def log_probabilities(self, text: str) -> np.ndarray:
        """(words,) natural logarithms of each word's probability after the two before it."""
        hashes = words(text).hashes
        lower = np.full(len(hashes), 1.0 / self.vocabulary)
        for order in range(1, ORDER + 1):
            gram, context = _grams(hashes, order)
            tail = len(hashes) - len(gram)  # the first words have no context of this length
            total, types = self.contexts[order - 1].look(context, self.followers[order - 1].counts)  # the same keys
            (seen,) = self.grams[order - 1].look(gram)
            below = lower[tail:]
            lower[tail:] = np.where(total > 0, (seen + types * below) / np.maximum(total + types, 1), below)
        return np.log(lower)

    def perplexity(self, text: str) -> float:
        """exp of the mean negative log-probability of a word; infinite for a text without words."""
        found = self.log_probabilities(text)
        return float(np.exp(-found.mean())) if len(found) else float("inf")

    def save(self, out: str | Path, parents: tuple[Parent, ...] = ()) -> None:
        """Write the model as an artifact."""
        with ArtifactWriter(out, kind=KIND, config={"order": ORDER}, parents=parents, format=FORMAT) as art:
            for name, tables in (("grams", self.grams), ("contexts", self.contexts), ("followers", self.followers)):
                for order, table in enumerate(tables, 1):
                    np.save(art.path / f"{name}-{order}.keys.npy", table.keys)
                    np.save(art.path / f"{name}-{order}.counts.npy", table.counts)
            art.figures.update(ngrams=[len(table.keys) for table in self.grams])

    @classmethod
    def load(cls, path: str | Path) -> NgramModel:
        """The model at `path`, its files verified and mapped. Raises ArtifactError where it is none."""
        check_hashes(path, open_artifact(path, KIND).format)

        def tables(name: str) -> list[Table]:
            return [
                Table(
                    *(np.load(Path(path) / f"{name}-{order}.{part}.npy", mmap_mode="r") for part in ("keys", "counts"))
                )
                for order in range(1, ORDER + 1)
            ]

        return cls(tables("grams"), tables("contexts"), tables("followers"))


def _grams(hashes: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every n-gram of this order, and of the words before its last; order 1 has one empty context."""
    grams = ngram_hashes(hashes, order)
    contexts = ngram_hashes(hashes, order - 1)[: len(grams)] if order > 1 else np.zeros(len(grams), np.uint64)
    return grams, contexts
