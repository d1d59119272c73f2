"""An index on disk: opened, checked against its encoder, and searched.

The manifest lists immutable segments, at most one array of which passages are still present, and at most one HNSW graph.
`luban.retrieval.building` writes them; a change is visible when the manifest has been replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from luban.core.artifact import Manifest, open_artifact
from luban.core.errors import ArtifactError, DataError, UnsupportedError, UsageError
from luban.retrieval.bm25 import BM25
from luban.retrieval.fusion import Fusion, Ranking, reciprocal_rank, top, zscore_sum
from luban.retrieval.hnsw import Graph
from luban.retrieval.passages import Passage
from luban.retrieval.segment import AllVectors, Segment, locate
from luban.retrieval.terms import FORMAT as TERMS_FORMAT
from luban.retrieval.terms import terms

if TYPE_CHECKING:
    from luban.retrieval.encoder import TextEncoder

KIND = "index"
SEGMENTS = "segments"
Retriever = Literal["bm25", "dense", "hybrid"]
DEPTH = 100  # best passages of each retriever that a hybrid search joins


@dataclass(frozen=True, kw_only=True, slots=True)
class Hit:
    """A passage that was found."""

    score: float  # of the retriever; comparable within one search
    passage: Passage
    place: int  # of the passage among all of the index

    def row(self) -> dict[str, Any]:
        """As plain data."""
        p = self.passage
        row = {
            "score": self.score,
            "title": p.title,
            "text": p.text,
            "source": p.source,
            "start": p.start,
            "stop": p.stop,
        }
        return {**row, "licence": p.licence} if p.licence else row


class Searches(Protocol):
    """What finds passages: an index, or one that is re-ranked."""

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        retriever: Retriever | None = None,
        fusion: Fusion = "zscore",
        exact: bool = False,
    ) -> list[Hit]:
        """The k best passages for a query, best first. See `Index.search_batch`."""
        ...


class Index:
    """Searches an index.

    Args:
        path: from `luban rag index`.
        encoder: the encoder that built it, where it isn't where it was then; None: the path that the index remembers.
        device: for the encoder, and for exact search, whose vectors must fit into its memory.

    Raises:
        ArtifactError: no index, a damaged one, or one whose encoder is gone.
        LineageError: an encoder other than the one that built it (checked at the first dense search).
    """

    def __init__(self, path: str | Path, *, encoder: str | Path | None = None, device: str = "cpu"):
        self.path, self.device = Path(path), device
        self.manifest: Manifest = open_artifact(path, KIND, verify=False)
        self.config = self.manifest.config
        if self.config["terms"] not in (None, TERMS_FORMAT):
            raise ArtifactError(f"{path} was built when words were counted in another way: build it again")
        self._encoder_name = encoder
        names = sorted({name.split("/")[1] for name in self.manifest.files if name.startswith(f"{SEGMENTS}/")})
        self.segments = [Segment(self.path / SEGMENTS / name) for name in names]
        self.places = sum(map(len, self.segments))
        present = next((name for name in self.manifest.files if name.startswith("present-")), None)
        self.present = np.ones(self.places, dtype=bool) if present is None else np.load(self.path / present)

    def __len__(self) -> int:
        return int(self.present.sum())

    @property
    def retriever(self) -> Retriever:
        """How it searches where nothing else is asked for."""
        return self.config["retriever"]

    @property
    def encoder_name(self) -> str | Path | None:
        """Path or name of the encoder that built the index, None without one."""
        return self._encoder_name or self.manifest.settings["encoder"]

    @property
    def built_with(self) -> str:
        """`--encoder` as `luban rag index` was given it: bm25, a model's path or name, or hybrid:MODEL."""
        name = self.manifest.settings["encoder"]
        return "bm25" if name is None else f"hybrid:{name}" if self.retriever == "hybrid" else name

    @cached_property
    def encoder(self) -> TextEncoder:
        """The encoder that built the index, loaded and compared when it is first needed."""
        if self.config["encoder"] is None:
            raise UnsupportedError(f"{self.path} has no dense vectors: it was built with --encoder bm25")
        from luban.retrieval.encoder import TextEncoder

        name = self.encoder_name
        assert name is not None
        try:
            found = TextEncoder.load(name, self.device)
        except ArtifactError as error:
            raise ArtifactError(
                f"{self.path} needs the encoder that built it: {error}; where it has moved, --encoder of luban rag "
                "names its place"
            ) from None
        found.require(self.config["encoder"], str(self.path))
        return found

    @cached_property
    def bm25(self) -> BM25:
        """The lexical side."""
        if self.config["terms"] is None:
            raise UnsupportedError(
                f"{self.path} has no postings for BM25: it was built with --encoder {self.built_with}, not "
                f"hybrid:{self.built_with}"
            )
        present = np.split(self.present, np.cumsum([len(segment) for segment in self.segments])[:-1])
        postings = [segment.postings for segment in self.segments]
        return BM25(list(zip(postings, present, strict=True)), **self.config["bm25"])

    @cached_property
    def vectors(self) -> AllVectors:
        """The dense side."""
        return AllVectors(self.segments, self.device)

    @property
    def graph_file(self) -> Path | None:
        """The file of the HNSW graph."""
        names = (name for name in self.manifest.files if name.startswith("graph-") and name.endswith(".usearch"))
        return next((self.path / name for name in names), None)

    @cached_property
    def graph(self) -> Graph | None:
        """The HNSW graph, where the index was built with one."""
        return None if self.graph_file is None else Graph.open(self.graph_file)

    def passage(self, place: int) -> Passage:
        """One passage."""
        segment, number = locate(self.segments, place)
        return segment.passage(number)

    def search(
        self,
        query: str,
        k: int = 5,
        *,
        retriever: Retriever | None = None,
        fusion: Fusion = "zscore",
        exact: bool = False,
    ) -> list[Hit]:
        """The k best passages for a query, best first; fewer where the index holds fewer or BM25 matches fewer.

        See `search_batch`.
        """
        return self.search_batch([query], k, retriever=retriever, fusion=fusion, exact=exact)[0]

    def search_batch(
        self,
        queries: Sequence[str],
        k: int = 5,
        *,
        retriever: Retriever | None = None,
        fusion: Fusion = "zscore",
        exact: bool = False,
    ) -> list[list[Hit]]:
        """The k best passages for each query.

        Args:
            retriever: of those that the index has; None: its own.
            fusion: of hybrid searches.
            exact: multiply with every vector even where there is an HNSW graph.

        Raises:
            UsageError: k below 1.
            DataError: an empty query.
            UnsupportedError: a retriever that the index wasn't built for.
        """
        if k < 1:
            raise UsageError(f"k: at least 1 passage is needed, {k} asked for")
        if any(not query.strip() for query in queries):
            raise DataError("an empty query finds nothing: ask for at least one word")
        rankings = self.rank(queries, k, retriever=retriever, fusion=fusion, exact=exact)
        return [self._hits(*ranking) for ranking in rankings]

    def rank(
        self,
        queries: Sequence[str],
        k: int,
        *,
        retriever: Retriever | None = None,
        fusion: Fusion = "zscore",
        exact: bool = False,
    ) -> list[Ranking]:
        """Places and scores of the k best passages for each query, without reading the passages."""
        retriever = retriever or self.retriever
        if retriever == "bm25":
            return [self._lexical(self.bm25.scores(terms(query)), k) for query in queries]
        vectors = self.encoder.queries(queries)
        if retriever == "dense":
            return self._dense(vectors, k, exact)
        dense = self._dense(vectors, max(DEPTH, k), exact)
        return [self._joined(*row, k, fusion) for row in zip(queries, vectors, dense, strict=True)]

    def nearest(self, vectors: np.ndarray, k: int) -> list[list[Hit]]:
        """The k passages with the largest inner products with each vector (Q, E) float32, by exact search, best first."""
        if self.config["encoder"] is None:
            raise UnsupportedError(f"{self.path} has no dense vectors: it was built with --encoder bm25")
        return [self._hits(*ranking) for ranking in self._dense(vectors, k, True)]

    def _hits(self, places: np.ndarray, scores: np.ndarray) -> list[Hit]:
        return [
            Hit(score=float(score), passage=self.passage(int(place)), place=int(place))
            for place, score in zip(places, scores, strict=True)
        ]

    def _lexical(self, scores: np.ndarray, k: int) -> Ranking:
        places = np.flatnonzero(scores > 0)
        return top(scores[places], k, places)

    def _dense(self, queries: np.ndarray, k: int, exact: bool) -> list[Ranking]:
        if self.graph is not None and not exact:
            expansion = self.manifest.figures["hnsw"].get("expansion")
            return self.graph.search(queries, k, self.present, self.vectors.inner, expansion)
        return self.vectors.search(queries, k, self.present)

    def _joined(self, query: str, vector: np.ndarray, dense: Ranking, k: int, fusion: Fusion) -> Ranking:
        every = self.bm25.scores(terms(query))
        rankings = [self._lexical(every, max(DEPTH, k)), dense]
        if fusion == "reciprocal":
            return reciprocal_rank(rankings, k)
        return zscore_sum(
            rankings, [lambda places: every[places], lambda places: self.vectors.inner(vector, places)], k
        )
