"""Segments: the passages of an index, a few ten thousand at a time, written once and never changed.

A segment is a folder with its passages as JSON lines and their byte offsets, its documents, and for each retriever what that
one needs: BM25's postings, a dense encoder's vectors.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luban.core.errors import ArtifactError
from luban.core.log import progress
from luban.retrieval.bm25 import Postings
from luban.retrieval.dense import Vectors
from luban.retrieval.fusion import Ranking, top
from luban.retrieval.passages import Passage
from luban.retrieval.terms import terms

if TYPE_CHECKING:
    from luban.retrieval.encoder import TextEncoder

BATCH = 256  # passages that an encoder is given at a time


class SegmentWriter:
    """Holds the passages of one segment until it is written.

    Args:
        lexical: whether BM25's postings are written.
        encoder: whose vectors are written; None: none.
        precision: of the vectors, float32 or int8.
    """

    def __init__(self, *, lexical: bool, encoder: TextEncoder | None, precision: str):
        self.lexical, self.encoder, self.precision = lexical, encoder, precision
        self.passages: list[Passage] = []
        self.documents: list[tuple[str, int]] = []  # (id, passages)

    def add(self, document: str, passages: Iterable[Passage]) -> None:
        """Append a document's passages."""
        before = len(self.passages)
        self.passages.extend(passages)
        self.documents.append((document, len(self.passages) - before))

    def write(self, folder: Path) -> None:
        """Write the segment into an empty folder."""
        lines = [
            json.dumps(asdict(passage), ensure_ascii=False).encode("utf-8", "replace") for passage in self.passages
        ]
        (folder / "passages.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        np.save(folder / "offsets.npy", np.cumsum([0, *(len(line) + 1 for line in lines)], dtype=np.int64))
        rows = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.documents)
        (folder / "documents.jsonl").write_text("".join(rows), encoding="utf-8")
        if self.lexical:  # words of titles count twice
            Postings.build([terms(f"{p.title} {p.title} {p.text}") for p in self.passages]).save(folder)
        if self.encoder is not None:
            Vectors.save(folder, self._vectors(self.encoder), self.precision)

    def _vectors(self, encoder: TextEncoder) -> np.ndarray:
        """(passages, E) float32."""
        made = np.empty((len(self.passages), encoder.width), dtype=np.float32)
        with progress("encoding", total=len(self.passages), unit="passages") as bar:
            for first in range(0, len(self.passages), BATCH):
                texts = [passage.titled for passage in self.passages[first : first + BATCH]]
                made[first : first + BATCH] = encoder.passages(texts)
                bar.advance(len(texts))
        return made


class Segment:
    """A segment on disk, mapped into memory as far as it is used."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def _texts(self) -> mmap.mmap | bytes:
        with open(self.folder / "passages.jsonl", "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""

    def passage(self, number: int) -> Passage:
        """One passage. Raises ArtifactError where its row is damaged."""
        row = self._texts[int(self.offsets[number]) : int(self.offsets[number + 1])]
        try:
            return Passage(**json.loads(row))
        except (ValueError, TypeError):
            raise ArtifactError(f"{self.folder / 'passages.jsonl'} is damaged at passage {number}") from None

    @cached_property
    def documents(self) -> list[tuple[str, int, int]]:
        """(id, first passage, last + 1) of every document."""
        found, first = [], 0
        for line in (self.folder / "documents.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
            name, count = json.loads(line)
            found.append((name, first, first + count))
            first += count
        return found

    @cached_property
    def postings(self) -> Postings:
        """BM25's."""
        return Postings.open(self.folder)

    @cached_property
    def vectors(self) -> Vectors:
        """The dense encoder's."""
        return Vectors.open(self.folder)


class AllVectors:
    """The vectors of several segments, whose places count through, searched on a device. Q queries, E width."""

    def __init__(self, segments: Sequence[Segment], device: str = "cpu"):
        self.segments, self.device = list(segments), device
        self.firsts = np.cumsum([0, *map(len, self.segments)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def search(self, queries: np.ndarray, k: int, present: np.ndarray) -> list[Ranking]:
        """The k largest inner products with each query (Q, E), by exact search; `present` (places,) bool."""
        scores, places = [], []
        for segment, first in zip(self.segments, self.firsts, strict=False):
            here = present[first : first + len(segment)]
            found = segment.vectors.search(queries, k, None if here.all() else here, self.device)
            scores.append(found[0])
            places.append(found[1] + first)
        rows = zip(np.concatenate(scores, 1), np.concatenate(places, 1), strict=True)
        return [top(s[kept], k, p[kept]) for s, p in rows for kept in [np.isfinite(s)]]

    def floats(self, places: np.ndarray) -> np.ndarray:
        """(n, E) float32 vectors at ascending places (n,)."""
        made = []
        for segment, first in zip(self.segments, self.firsts, strict=False):
            inside = slice(*np.searchsorted(places, [first, first + len(segment)]))
            if inside.start < inside.stop:
                made.append(segment.vectors.floats(places[inside] - first))
        return np.concatenate(made) if made else np.zeros((0, self.segments[0].vectors.rows.shape[1]), np.float32)

    def inner(self, query: np.ndarray, places: np.ndarray) -> np.ndarray:
        """(n,) inner products of a query (E,) with the vectors at ascending places (n,)."""
        return self.floats(places) @ query


def locate(segments: Sequence[Segment], place: int) -> tuple[Segment, int]:
    """The segment and the number in it of the passage at `place` in all segments, one after another."""
    for segment in segments:
        if place < len(segment):
            return segment, place
        place -= len(segment)
    raise IndexError(place)
