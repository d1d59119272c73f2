"""A linear classifier of text over hashed words and word pairs, as fastText's without a hidden layer
(Joulin et al. 2017): text people chose against text of any kind, as GPT-3 and LLaMA filter CommonCrawl.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from luban.core.artifact import ArtifactWriter, Parent, open_artifact
from luban.core.errors import DataError
from luban.core.seeding import generator
from luban.corpus.words import FORMAT, check_hashes, ngram_hashes, words

BUCKETS = 1 << 18  # weights
LONGEST = 1000  # words looked at
EPOCHS, RATE = 5, 0.5  # of Adagrad (Duchi et al. 2011)
KIND = "text-classifier"


def features(text: str) -> np.ndarray:
    """(any,) int64 buckets of a text's words and word pairs."""
    hashes = words(text[: 20 * LONGEST]).hashes[:LONGEST]
    return (np.concatenate([ngram_hashes(hashes, 1), ngram_hashes(hashes, 2)]) % np.uint64(BUCKETS)).astype(np.int64)


class LinearModel:
    """score(text) is the probability that a text is of the good kind: a logistic function of its mean weight."""

    def __init__(self, weights: np.ndarray, bias: float):
        self.weights, self.bias = weights, bias

    @classmethod
    def train(cls, good: Iterable[str], other: Iterable[str], seed: int = 0) -> LinearModel:
        """Learn from two kinds of texts, both weighted as if they were as many.

        Raises:
            DataError: a kind without words.
        """
        kinds = [[found for text in texts if len(found := features(text))] for texts in (other, good)]
        if not all(kinds):
            raise DataError("a text classifier needs texts with words of both kinds")
        examples = [
            (found, label, max(map(len, kinds)) / len(kinds[label]))
            for label, texts in enumerate(kinds)
            for found in texts
        ]
        weights, squares, bias, bias_square = np.zeros(BUCKETS), np.full(BUCKETS, 1e-8), 0.0, 1e-8
        random = generator(seed, "text-classifier")
        for _ in range(EPOCHS):
            for place in random.permutation(len(examples)).tolist():
                found, label, share = examples[place]
                places, counts = np.unique(found, return_counts=True)
                fractions = counts / len(found)
                error = share * (_logistic(float(bias + weights[places] @ fractions)) - label)
                slope = error * fractions
                squares[places] += slope**2
                weights[places] -= RATE * slope / np.sqrt(squares[places])
                bias_square += error**2
                bias -= RATE * error / np.sqrt(bias_square)
        return cls(weights.astype(np.float32), float(bias))

    def score(self, text: str) -> float:
        """Between 0 and 1; 0 for a text without words."""
        found = features(text)
        return float(_logistic(self.bias + float(self.weights[found].mean(dtype=np.float64)))) if len(found) else 0.0

    def save(self, out: str | Path, parents: Sequence[Parent] = (), seed: int = 0) -> None:
        """Write the model as an artifact."""
        with ArtifactWriter(
            out, kind=KIND, config={"buckets": BUCKETS}, parents=tuple(parents), seed=seed, format=FORMAT
        ) as art:
            np.save(
                art.path / "weights.npy", np.concatenate([self.weights, [np.float32(self.bias)]]).astype(np.float32)
            )

    @classmethod
    def load(cls, path: str | Path) -> LinearModel:
        """The model at `path`, verified. Raises ArtifactError where it is none."""
        check_hashes(path, open_artifact(path, KIND).format)
        held = np.load(Path(path) / "weights.npy")
        return cls(held[:-1], float(held[-1]))


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-min(max(x, -30.0), 30.0)))
