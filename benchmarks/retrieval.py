"""Exact inner product search beside faiss's flat index, HNSW beside exact search, BM25 beside bm25s; encoding beside
sentence-transformers where that is installed.

    python benchmarks/retrieval.py --vectors 1000000 --threads 2 --hnsw
    python benchmarks/retrieval.py --only dense --device cuda

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
from luban.retrieval.dense import quantise
from luban.retrieval.fusion import Ranking
from luban.retrieval.hnsw import EXPANSIONS, Graph
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


Rates = tuple[float, float, float]  # (median, least, largest) queries a second


def rates(runs: dict[str, Callable[[], object]], queries: int, rounds: int) -> dict[str, Rates]:
    """Of each, in turns, so that all of them meet the same load of the machine; a first round isn't counted."""
    times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if number:
                times[name].append(queries / (time.perf_counter() - began))
    return {name: (statistics.median(found), min(found), max(found)) for name, found in times.items()}


def show(name: str, found: Rates, note: str = "") -> None:
    print(f"{name:<34} {found[0]:10.1f} queries/s ({found[1]:.1f} to {found[2]:.1f})  {note}", flush=True)


def dense(args: argparse.Namespace) -> None:
    rng = generator(0, "retrieval")
    centres = rng.standard_normal((CLUSTERS, args.width)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    vectors = clustered(rng, args.vectors, args.width, centres)
    queries = clustered(rng, args.queries, args.width, centres)
    held, rows = torch.from_numpy(vectors).to(args.device), torch.from_numpy(queries).to(args.device)
    small, scales = (torch.from_numpy(each).to(args.device) for each in quantise(vectors))
    flat = {}
    for count in (1, args.queries):
        runs: dict[str, Callable[[], object]] = {
            "luban exact": lambda n=count: waited(exact_search(held, rows[:n], args.k)),
            "luban exact, int8": lambda n=count: waited(exact_search(small, rows[:n], args.k, scales=scales)),
        }
        if args.device == "cpu":
            try:
                import faiss

                faiss.omp_set_num_threads(args.threads)
                runs["faiss flat"] = lambda n=count: faiss.knn(queries[:n], vectors, args.k, faiss.METRIC_INNER_PRODUCT)
            except ImportError:
                print("faiss-cpu isn't installed")
        flat = rates(runs, count, args.rounds)
        for name, found in flat.items():
            size = vectors.nbytes / (4 if "int8" in name else 1)
            read = f"reads {found[0] * size / 1e9:.0f} GB/s" if count == 1 else ""
            show(f"{name}, {count} queries together", found, read)
    if args.device != "cpu":
        copied = statistics.median(1 / seconds for seconds in times_of(lambda: waited(held.clone()), args.rounds))
        print(f"{'a copy reads and writes':<34} {2 * copied * vectors.nbytes / 1e9:10.0f} GB/s")
    if args.hnsw:
        graph_beside(args, vectors, queries, flat["luban exact"][0])


def waited(found: object) -> object:
    """What was found, once the device has found it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found


def times_of(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each round; a first one isn't counted."""
    found = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return found[1:]


def graph_beside(args: argparse.Namespace, vectors: np.ndarray, queries: np.ndarray, exact_rate: float) -> None:
    """A graph of the vectors: recall and rate by how many candidates are held while a query is answered."""
    graph = Graph.empty(args.width)
    began = time.perf_counter()
    graph.add(np.arange(args.vectors), vectors, args.threads)
    print(f"HNSW of {args.vectors} vectors built in {time.perf_counter() - began:.0f} s", flush=True)
    present = np.ones(args.vectors, dtype=bool)
    _, exact = exact_search(torch.from_numpy(vectors), torch.from_numpy(queries), args.k)

    def search(expansion: int) -> list[Ranking]:
        return graph.search(queries, args.k, present, lambda query, places: vectors[places] @ query, expansion)

    for expansion in EXPANSIONS:
        pairs = zip(search(expansion), exact.tolist(), strict=True)
        shared = sum(len(set(places.tolist()) & set(right)) for (places, _), right in pairs)
        (found,) = rates({"": lambda expansion=expansion: search(expansion)}, len(queries), args.rounds).values()
        note = f"recall@{args.k} {shared / (args.k * len(queries)):.3f}, {found[0] / exact_rate:.0f} times exact search"
        show(f"luban HNSW, {expansion} candidates", found, note)


def lexical(args: argparse.Namespace) -> None:
    rng = generator(0, "words")
    shares = 1 / np.arange(1, WORDS + 1)
    shares /= shares.sum()
    texts = [" ".join(f"w{i}" for i in row) for row in rng.choice(WORDS, (args.passages, 100), p=shares)]
    asked = [" ".join(f"w{i}" for i in row) for row in rng.choice(WORDS, (args.queries, 8), p=shares)]
    postings = Postings.build([terms(text) for text in texts])
    ours = BM25([(postings, np.ones(len(texts), dtype=bool))])
    runs: dict[str, Callable[[], object]] = {"luban BM25": lambda: [ours.scores(terms(query)) for query in asked]}
    try:
        import bm25s

        peer = bm25s.BM25(method="lucene", k1=K1, b=B)
        peer.index([text.split() for text in texts], show_progress=False)
        runs["bm25s"] = lambda: [peer.get_scores(query.split()) for query in asked]
    except ImportError:
        print("bm25s isn't installed")
    for name, found in rates(runs, len(asked), args.rounds).items():
        show(name, found)


def encoding(args: argparse.Namespace) -> None:
    from luban.retrieval.encoder import TextEncoder
    from luban.retrieval.packaged import packaged_folder

    folder = packaged_folder("minilm")
    if folder is None:
        print("minilm isn't installed")
        return
    rng = generator(0, "texts")
    texts = [" ".join(rng.choice(["time", "water", "people", "house", "river"], 100)) for _ in range(args.texts)]
    encoder = TextEncoder.load("minilm", args.device)
    runs: dict[str, Callable[[], object]] = {"luban MiniLM, 100 words": lambda: encoder.passages(texts)}
    try:
        from sentence_transformers import SentenceTransformer

        peer = SentenceTransformer(str(folder), device=args.device)
        runs["sentence-transformers MiniLM"] = lambda: peer.encode(texts)
        print(f"largest difference {np.abs(peer.encode(texts[:8]) - encoder.passages(texts[:8])).max():.1e}")
    except ImportError:
        print("sentence-transformers isn't installed")
    for name, found in rates(runs, len(texts), args.rounds).items():
        show(name, found)


PARTS = {"dense": dense, "lexical": lexical, "encoding": encoding}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--passages", type=int, default=50_000, help="of BM25")
    parser.add_argument("--texts", type=int, default=64, help="to encode")
    parser.add_argument("--device", default="cpu", help="of exact search and of encoding")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hnsw", action="store_true", help="build a graph, too: minutes for a million vectors")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.only:
        PARTS[name](args)


if __name__ == "__main__":
    main()
