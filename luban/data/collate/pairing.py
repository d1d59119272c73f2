"""Pairs of segments and whether they belong together: next sentence (BERT), sentence order (ALBERT)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from luban.core.errors import DataError
from luban.core.registry import Registry, Variant
from luban.data.collate.rows import DocumentPieces

FOLLOWS, OTHER = 0, 1  # classes: the second segment follows the first, or it doesn't


@dataclass(frozen=True, kw_only=True)
class Pairing(Variant):
    """Base config of how half of all pairs are broken up."""

    registry: ClassVar[Registry] = Registry(
        "pairing",
        {
            "next_sentence": "luban.data.collate.pairing:NextSentence",
            "sentence_order": "luban.data.collate.pairing:SentenceOrder",
        },
    )

    def check(self, pieces: DocumentPieces) -> None:
        """Raise DataError where these pieces make no pairs."""

    def corrupt(
        self, rng: np.random.Generator, one: np.ndarray, two: np.ndarray, pieces: DocumentPieces, row: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Two segments that don't belong together in this order, from two that do."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NextSentence(Pairing):
    """The second segment comes from another document (Devlin et al. 2019, section 3.1)."""

    def check(self, pieces: DocumentPieces) -> None:
        """There is another document."""
        if len(np.unique(pieces.document)) < 2:
            raise DataError("next-sentence pairs need at least two documents")

    def corrupt(
        self, rng: np.random.Generator, one: np.ndarray, two: np.ndarray, pieces: DocumentPieces, row: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The first segment and as many tokens of another document, fewer where it has fewer."""
        other = int(rng.integers(pieces.rows))
        while pieces.document[other] == pieces.document[row]:
            other = int(rng.integers(pieces.rows))
        piece = pieces.piece(other)
        start = int(rng.integers(max(len(piece) - len(two), 0) + 1))
        return one, piece[start : start + len(two)]


@dataclass(frozen=True, kw_only=True)
class SentenceOrder(Pairing):
    """The two segments change places (Lan et al. 2020, section 3.1)."""

    def corrupt(
        self, rng: np.random.Generator, one: np.ndarray, two: np.ndarray, pieces: DocumentPieces, row: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Second, first."""
        return two, one
