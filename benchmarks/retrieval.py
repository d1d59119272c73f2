"""Exact inner product search beside faiss's flat index, HNSW beside exact search, BM25 beside bm25s; encoding beside
sentence-transformers where that is installed.

    python benchmarks/retrieval.py --vectors 1000000 --threads 2

Vectors are drawn in clusters, of unit length. faiss.knn is what faiss.IndexFlatIP runs, without a second copy of the vectors.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from luban.core.seeding import generator
from luban.retrieval.bm25 import BM25, K1, B, Postings
from luban.retrieval.hnsw import Graph
from luban.retrieval.mips import exact_search
from luban.retrieval.terms import terms

CLUSTERS = 1000
SPREAD = 0.6  # of a vector around its cluster's centre, as a multiple of the centre's length
WORDS = 20_000  # of the vocabulary that texts are drawn from


def clustered(rng: np.random.Generator, count: int, width: int, centres: np.ndarray) -> np.ndarray:
    """(count, width) float32 unit vectors around the centres."""
    made = np.empty((count, width), dtype=np.float32)
    for first in range(0, count, 1 << 16):
        size = min(1 << 16, count - first)
        rows = centres[rng.integers(0, len(centres), size)]
        rows = rows + SPREAD / width**0.5 * rng.standard_normal((size, width), dtype=np.float32)
        made[first : first + size] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return made


def rate(run: Callable[[], object], queries: int, rounds: int) -> tuple[float, float, float]:
    """(median, least, largest) queries a second."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(queries / (time.perf_counter() - began))
    return statistics.median(times), min(times), max(times)


def show(name: str, found: tuple[float, float, float], note: str = "") -> None:
    print(f"{name:<34} {found[0]:10.1f} queries/s ({found[1]:.1f} to {found[2]:.1f})  {note}", flush=True)


def dense(args: argparse.Namespace) -> None:
    rng = generator(0, "retrieval")
    centres = rng.standard_normal((CLUSTERS, args.width)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = clustered(rng, args.vectors, args.width, centres)
    queries = clustered(rng, args.queries, args.width, centres)
    held = torch.from_numpy(vectors)
    for count in (1, args.queries):
        some = queries[:count]
        runs: dict[str, Callable[[], object]] = {
            "luban exact": lambda some=some: exact_search(held, torch.from_numpy(some), args.k)
        }
        try:
            import faiss

            faiss.omp_set_num_threads(args.threads)
            runs["faiss flat"] = lambda some=some: faiss.knn(some, vectors, args.k, faiss.METRIC_INNER_PRODUCT)
        except ImportError:
            print("faiss-cpu isn't installed")
        for name, run in runs.items():
            show(f"{name}, {count} queries together", rate(run, count, args.rounds))
    if args.hnsw:
        graph = Graph.empty(args.width)
        began = time.perf_counter()
        graph.add(np.arange(args.vectors), vectors, args.threads)
        built = time.perf_counter() - began
        present = np.ones(args.vectors, dtype=bool)

        def search() -> list:
            return graph.search(queries, args.k, present, lambda query, places: vectors[places] @ query)

        _, exact = exact_search(held, torch.from_numpy(queries), args.k)
        shared = [len(set(p.tolist()) & set(e)) for (p, _), e in zip(search(), exact.tolist(), strict=True)]
        note = f"recall@{args.k} {sum(shared) / (args.k * len(queries)):.3f}, built in {built:.0f} s"
        show("luban HNSW", rate(search, len(queries), args.rounds), note)


def lexical(args: argparse.Namespace) -> None:
    rng = generator(0, "words")
    shares = 1 / np.arange(1, WORDS + 1)
    shares /= shares.sum()
    texts = [" ".join(f"w{i}" for i in row) for row in rng.choice(WORDS, (args.passages, 100), p=shares)]
    asked = [" ".join(f"w{i}" for i in row) for row in rng.choice(WORDS, (args.queries, 8), p=shares)]
    postings = Postings.build([terms(text) for text in texts])
    ours = BM25([(postings, np.ones(len(texts), dtype=bool))])
    show("luban BM25", rate(lambda: [ours.scores(terms(query)) for query in asked], len(asked), args.rounds))
    try:
        import bm25s
    except ImportError:
        return
    peer = bm25s.BM25(method="lucene", k1=K1, b=B)
    peer.index([text.split() for text in texts], show_progress=False)
    show("bm25s", rate(lambda: [peer.get_scores(query.split()) for query in asked], len(asked), args.rounds))


def encoding(args: argparse.Namespace) -> None:
    from luban.retrieval.encoder import TextEncoder
    from luban.retrieval.packaged import packaged_folder

    folder = packaged_folder("minilm")
    if folder is None:
        print("minilm isn't installed")
        return
    rng = generator(0, "texts")
    texts = [" ".join(rng.choice(["time", "water", "people", "house", "river"], 100)) for _ in range(args.texts)]
    encoder = TextEncoder.load("minilm")
    show("luban MiniLM, 100 words", rate(lambda: encoder.passages(texts), len(texts), args.rounds))
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print("sentence-transformers isn't installed")
        return
    peer = SentenceTransformer(str(folder), device="cpu")
    show("sentence-transformers MiniLM", rate(lambda: peer.encode(texts), len(texts), args.rounds))
    print(f"largest difference {np.abs(peer.encode(texts[:8]) - encoder.passages(texts[:8])).max():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--passages", type=int, default=50_000, help="of BM25")
    parser.add_argument("--texts", type=int, default=64, help="to encode")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hnsw", action="store_true", help="build a graph, too: minutes for a million vectors")
    parser.add_argument("--only", choices=["dense", "lexical", "encoding"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, part in (("dense", dense), ("lexical", lexical), ("encoding", encoding)):
        if args.only in (None, name):
            part(args)


if __name__ == "__main__":
    main()
