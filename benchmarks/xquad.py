"""Retrievers beside each other on questions about held-out paragraphs: BM25, a sentence encoder as it comes and tuned by DPR's
loss, both joined with BM25, and a cross-encoder that re-ranks.

    python benchmarks/xquad.py --data xquad.en.json --out runs/xquad --seeds 3

Each seed keeps another half of the paragraphs from training; its held-out questions are asked of all paragraphs. Differences are
paired: a question that several seeds hold out counts once, with the mean of its differences. What is in --out is not trained
again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from luban.core.metrics.bootstrap import interval
from luban.retrieval.building import IndexConfig, build_index
from luban.retrieval.documents import DocumentReader
from luban.retrieval.evaluation import Method, ranks
from luban.retrieval.index import Index
from luban.retrieval.passages.document import WholeDocument
from luban.retrieval.questions import Question, read_questions
from luban.retrieval.reranking import reranked
from luban.retrieval.training.cross import RerankerRecipe, train_reranker
from luban.retrieval.training.pairs import split
from luban.retrieval.training.train import EncoderRecipe, train_encoder

KS = (1, 5, 20)
Ranks = dict[str, list[int]]  # method → rank (from 1) of each question's passage, 0 beyond the 20 best


def once(made: Path, make: Callable[[], object]) -> Path:
    """`made`, which is written unless it is there."""
    if not made.exists():
        make()
    return made


def index_of(args: argparse.Namespace, encoder: str, out: Path) -> Index:
    """Of all paragraphs, by BM25 and the encoder."""
    config = IndexConfig(retriever="hybrid", encoder=encoder, rule=WholeDocument())
    return Index(
        once(out, lambda: build_index(DocumentReader([str(args.data)]), out, config, device=args.device)),
        device=args.device,
    )


def seed_ranks(args: argparse.Namespace, seed: int, questions: Sequence[Question]) -> Ranks:
    """Every method's ranks of one seed's held-out questions."""
    folder = args.out / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    recipe = EncoderRecipe(
        data=args.data, encoder=args.encoder, heldout=args.heldout, epochs=args.epochs, seed=seed, device=args.device
    )
    encoder = once(folder / "encoder", lambda: train_encoder(recipe, folder / "encoder"))
    found: Ranks = {}
    plain, tuned = (
        index_of(args, args.encoder, args.out / "index"),
        index_of(args, str(encoder), folder / "index"),
    )
    found["BM25"] = ranks(plain, questions, Method(name="BM25", retriever="bm25"), max(KS))
    mine = Path(args.encoder).name
    for name, index in ((mine, plain), (f"{mine}, tuned", tuned)):
        found[name] = ranks(index, questions, Method(name=name, retriever="dense"), max(KS))
        for fusion, words in (("reciprocal", "reciprocal rank"), ("zscore", "z-scores")):
            method = Method(name=f"BM25 and {name}, {words}", retriever="hybrid", fusion=fusion)
            found[method.name] = ranks(index, questions, method, max(KS))
    if seed < args.reranked:
        cross = RerankerRecipe(
            data=args.data,
            encoder=args.encoder,
            heldout=args.heldout,
            epochs=args.rerank_epochs,
            seed=seed,
            device=args.device,
        )
        reader = once(folder / "reranker", lambda: train_reranker(cross, folder / "reranker"))
        read = reranked(tuned, str(reader), args.device, args.depth)
        method = Method(name=f"tuned hybrid, its {args.depth} best re-ranked", retriever=None, reranked=read)
        found[method.name] = ranks(tuned, questions, method, max(KS))
    return found


def by_question(per_seed: Sequence[tuple[list[str], np.ndarray]]) -> list[float]:
    """The mean over seeds of each question's numbers."""
    values = defaultdict(list)
    for names, numbers in per_seed:
        for name, number in zip(names, numbers, strict=True):
            values[name].append(float(number))
    return [sum(numbers) / len(numbers) for numbers in values.values()]


def right(found: Ranks, method: str, k: int = 1) -> np.ndarray:
    """(questions,) whether the passage is among the k best."""
    place = np.array(found[method])
    return (place > 0) & (place <= k)


def show(args: argparse.Namespace, results: Sequence[tuple[list[str], Ranks]]) -> None:
    """The table, and the paired differences at top-1."""
    print(f"{'':<40}" + "".join(f"{f'top-{k}':>22}" for k in KS) + f"{'MRR':>8}{'seeds':>7}")
    for method in dict.fromkeys(method for _, found in results for method in found):
        having = [(names, found) for names, found in results if method in found]
        cells = []
        for k in KS:
            scores = by_question([(names, right(found, method, k)) for names, found in having])
            low, high = interval(scores)
            cells.append(f"{np.mean(scores):8.1%} ({low:.1%}-{high:.1%})")
        gains = [np.array([1 / place if place else 0.0 for place in found[method]]) for _, found in having]
        mrr = np.mean(by_question([(names, g) for (names, _), g in zip(having, gains, strict=True)]))
        print(f"{method:<40}" + "".join(f"{cell:>22}" for cell in cells) + f"{mrr:8.3f}{len(having):7d}")
    name = Path(args.encoder).name
    pairs = [
        (f"{name}, tuned", name),
        (f"BM25 and {name}, z-scores", "BM25"),
        (f"BM25 and {name}, tuned, z-scores", "BM25"),
        (f"tuned hybrid, its {args.depth} best re-ranked", f"BM25 and {name}, tuned, z-scores"),
    ]
    for above, below in pairs:
        having = [(names, found) for names, found in results if above in found and below in found]
        if not having:
            continue
        gains = [(names, right(found, above).astype(int) - right(found, below)) for names, found in having]
        shown = [
            f"{g.mean():+.1%} ({low:+.1%} to {high:+.1%})" for _, g in gains for low, high in [interval(g.tolist())]
        ]
        every = by_question(gains)
        low, high = interval(every)
        print(
            f"{above} - {below}, top-1: {np.mean(every):+.1%} ({low:+.1%} to {high:+.1%}); by seed {', '.join(shown)}"
        )


def main() -> None:
    """Train, ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="questions in SQuAD's format")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--encoder", default="minilm", help="to begin with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reranked", type=int, default=1, help="seeds of which a cross-encoder is trained, too")
    parser.add_argument("--heldout", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=2, help="of the sentence encoder")
    parser.add_argument("--rerank-epochs", type=int, default=1, help="of the cross-encoder")
    parser.add_argument("--depth", type=int, default=20, help="passages that the cross-encoder reads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    for seed in range(args.seeds):
        _, heldout = split(read_questions(args.data), args.heldout, seed)
        ranked = args.out / str(seed) / "ranks.json"
        once(
            ranked, lambda seed=seed, to=ranked, asked=heldout: to.write_text(json.dumps(seed_ranks(args, seed, asked)))
        )
        results.append(([question.text for question in heldout], json.loads(ranked.read_text())))
        show(args, results)


if __name__ == "__main__":
    main()
