"""The HNSW graph of an index: built, extended, and compared with exact search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from luban.retrieval.hnsw import EXPANSIONS, Graph
from luban.retrieval.segment import AllVectors, Segment

WANTED = 0.95  # recall@10 of which more candidates are held until it is reached, as far as EXPANSIONS go
PROBES = 100  # queries for which the graph is compared with exact search
NOISE = 0.5  # of a probe, in standard deviations of the coordinate


def vector_blocks(segments: Sequence[Segment]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places (n,), vectors (n, E)) of each segment."""
    first = 0
    for segment in segments:
        yield np.arange(first, first + len(segment)), segment.vectors.floats(slice(None))
        first += len(segment)


def write_graph(
    folder: Path, segments: Sequence[Segment], generation: int, old: Path | None = None
) -> dict[str, float | int]:
    """Write the graph of all segments as the file of a generation, and measure it.

    Args:
        old: a graph of the first of these segments, to which the others are added.

    Returns recall_at_10 against exact search, the candidates that a search holds for it (`expansion`), and the bytes of the file.
    """
    width = segments[0].vectors.rows.shape[1]
    graph = Graph.empty(width) if old is None else Graph.open(old, writable=True)
    held = len(graph.index)
    for places, rows in vector_blocks(segments):
        if places[0] >= held:
            graph.add(places, rows)
    file = folder / f"graph-{generation:06d}.usearch"
    graph.save(file)
    found, expansion = 0.0, 0
    for expansion in EXPANSIONS:
        found = recall(graph, segments, expansion)
        if found >= WANTED:
            break
    return {"recall_at_10": round(found, 4), "expansion": expansion, "bytes": file.stat().st_size}


def recall(graph: Graph, segments: Sequence[Segment], expansion: int, k: int = 10) -> float:
    """The share of the exact k best that the graph finds, vectors of the index with noise being the queries."""
    rng, every = np.random.default_rng(0), AllVectors(segments)
    chosen = np.sort(rng.choice(len(every), min(PROBES, len(every)), replace=False))
    rows = every.floats(chosen)
    queries = (rows + NOISE * rows.std(0) * rng.standard_normal(rows.shape)).astype(np.float32)
    present = np.ones(len(every), dtype=bool)
    exact, found = every.search(queries, k, present), graph.search(queries, k, present, every.inner, expansion)
    shared = sum(len(np.intersect1d(a, b)) for (a, _), (b, _) in zip(exact, found, strict=True))
    return shared / sum(len(places) for places, _ in exact)
