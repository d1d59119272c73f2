"""BM25 (Robertson and Zaragoza 2009) over postings on the disk, with Lucene's weights.

    score(q, d) = Σ over terms t of q:  ln(1 + (N - n_t + ½) / (n_t + ½)) · f / (f + k1 · (1 - b + b · |d| / mean|d|))

where N passages there are, n_t hold t, f times each, and |d| is a passage's length in terms. Postings hold counts, and a
query computes the rest from all segments of an index together. So passages can be added and removed without touching what
is stored, and scores equal those of an index built anew. (Libraries that store final scores, such as bm25s, have to
compute them all again when N changes; the tests compare with it.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

K1, B = 0.9, 0.4  # as Pyserini and DPR's authors use for passages of 100 words
FILES = ("terms", "starts", "passages", "counts", "lengths")


@dataclass(frozen=True, kw_only=True)
class Postings:
    """Which passages of a segment hold which terms. P passages, U different terms, Q pairs of them."""

    terms: np.ndarray  # (U,) uint64, ascending
    starts: np.ndarray  # (U + 1,) int64: where each term's pairs begin
    passages: np.ndarray  # (Q,) int32, ascending for each term
    counts: np.ndarray  # (Q,) int32: how often the term occurs in the passage
    lengths: np.ndarray  # (P,) int32: terms of each passage

    @classmethod
    def build(cls, passages: Sequence[np.ndarray]) -> Postings:
        """From the terms (uint64) of each passage."""
        lengths = np.array([len(terms) for terms in passages], dtype=np.int32)
        every = np.concatenate([np.zeros(0, np.uint64), *passages])
        numbers = np.repeat(np.arange(len(passages), dtype=np.int32), lengths)
        order = np.argsort(every, kind="stable")
        every, numbers = every[order], numbers[order]
        first = np.ones(len(every), dtype=bool)  # of its (term, passage) pair
        first[1:] = (every[1:] != every[:-1]) | (numbers[1:] != numbers[:-1])
        places = np.flatnonzero(first)
        terms, starts = np.unique(every[places], return_index=True)
        return cls(
            terms=terms,
            starts=np.append(starts, len(places)).astype(np.int64),
            passages=numbers[places],
            counts=np.diff(np.append(places, len(every))).astype(np.int32),
            lengths=lengths,
        )

    def save(self, folder: Path) -> None:
        """Write one file an array."""
        for name in FILES:
            np.save(folder / f"bm25_{name}.npy", getattr(self, name))

    @classmethod
    def open(cls, folder: Path) -> Postings:
        """Map the arrays into memory."""
        return cls(**{name: np.load(folder / f"bm25_{name}.npy", mmap_mode="r") for name in FILES})

    def of(self, term: np.uint64) -> tuple[np.ndarray, np.ndarray]:
        """(passages, counts) of a term."""
        place = int(np.searchsorted(self.terms, term))
        if place == len(self.terms) or self.terms[place] != term:
            return self.passages[:0], self.counts[:0]
        pairs = slice(int(self.starts[place]), int(self.starts[place + 1]))
        return self.passages[pairs], self.counts[pairs]


class BM25:
    """Scores of queries over the postings of several segments.

    Args:
        segments: postings, and which passages (P,) bool are still there.
    """

    def __init__(self, segments: Sequence[tuple[Postings, np.ndarray]], k1: float = K1, b: float = B):
        self.segments = list(segments)
        self.passages = sum(int(present.sum()) for _, present in self.segments)
        total = sum(int(p.lengths[present].sum(dtype=np.int64)) for p, present in self.segments)
        mean = total / max(self.passages, 1)
        self._saturation = [k1 * (1 - b + b * p.lengths / max(mean, 1e-9)) for p, _ in self.segments]

    def scores(self, query: np.ndarray) -> np.ndarray:
        """(all passages,) float64 of a query's terms (uint64), segments one after another; removed ones have 0."""
        scores = [np.zeros(len(p.lengths)) for p, _ in self.segments]
        for term, times in zip(*np.unique(query, return_counts=True), strict=True):
            found = [self._present(segment, term) for segment in self.segments]
            holding = sum(len(passages) for passages, _ in found)
            weight = float(times) * np.log1p((self.passages - holding + 0.5) / (holding + 0.5))
            for score, saturation, (passages, counts) in zip(scores, self._saturation, found, strict=True):
                score[passages] += weight * counts / (counts + saturation[passages])
        return np.concatenate([np.zeros(0), *scores])

    def _present(self, segment: tuple[Postings, np.ndarray], term: np.uint64) -> tuple[np.ndarray, np.ndarray]:
        postings, present = segment
        passages, counts = postings.of(term)
        kept = present[passages]
        return (passages, counts) if kept.all() else (passages[kept], counts[kept])
