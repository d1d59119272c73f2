"""What DPR's loss learns where questions and passages share few words, and what larger batches give.

    python benchmarks/paraphrases.py --out runs/paraphrases --seeds 3

A passage names eight of 100 things by one of two words each, a question four of the things in its passage: seven times of ten by
other words, of which only training says what they mean. Small encoders of random weights are trained on as many questions with
each batch size, the learning rate growing with its root, and asked about held-out passages among all; BM25 is asked beside them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import luban
from luban.core.metrics.bootstrap import interval
from luban.load.export import export_model
from luban.models.spec import uniform, write_spec
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.retrieval.bm25 import BM25, Postings
from luban.retrieval.encoder import TextEncoder
from luban.retrieval.fusion import top
from luban.retrieval.questions import Question, read_questions
from luban.retrieval.terms import terms
from luban.retrieval.training.pairs import split
from luban.retrieval.training.train import EncoderRecipe, ranks, train_encoder
from luban.tokenizer.train import train_tokenizer

THINGS, IN_PASSAGE, IN_QUESTION = 100, 8, 4
SAME_WORD = 0.3  # share of a question's words that are those of its passage
K = 20


def write_questions(file: Path, count: int, seed: int) -> list[str]:
    """Questions with their passages in DPR's format; returns all texts."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    words: set[str] = set()
    while len(words) < 4 * THINGS:
        words.add("".join(rng.choices(syllables, k=3)))
    order = sorted(words)
    rng.shuffle(order)
    said, asked = np.array(order).reshape(2, THINGS, 2).tolist()
    rows = []
    for _ in range(count):
        things = rng.sample(range(THINGS), IN_PASSAGE)
        passage = {thing: rng.choice(said[thing]) for thing in things}
        question = [
            passage[thing] if rng.random() < SAME_WORD else rng.choice(asked[thing])
            for thing in rng.sample(things, IN_QUESTION)
        ]
        text = " ".join(passage.values())
        rows.append({"question": " ".join(question), "answers": [text], "positive_ctxs": [{"title": "", "text": text}]})
    file.write_text(json.dumps(rows))
    return [text for row in rows for text in (row["question"], row["answers"][0])]


def random_encoder(texts: list[str], folder: Path, seed: int) -> Path:
    """A model of random weights, whose hidden states are pooled, that knows the texts' words."""
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=2400)
    spec = uniform(
        vocab_size=tokenizer.vocab_size,
        width=64,
        layers=1,
        context=48,
        mixer=Grouped(heads=2),
        feedforward=SwiGLU(width=128),
    )
    start = folder / "weights"
    start.mkdir()
    write_spec(spec, start)
    save_file(dict(luban.build_model(spec, seed=seed).named_parameters()), start / "model.safetensors")
    (folder / "tokenizer").rename(start / "tokenizer")
    return export_model(luban.load_model(start), folder / "start")


def lexical_ranks(questions: list[Question], collection: list[tuple[str, str]]) -> np.ndarray:
    """BM25's rank of each question's passage, beyond the K best K + 1."""
    bm25 = BM25([(Postings.build([terms(text) for _, text in collection]), np.ones(len(collection), dtype=bool))])
    found = []
    for question in questions:
        places, scores = top(bm25.scores(terms(question.text)), K)
        right = [
            collection[place] == question.positives[0] and score > 0
            for place, score in zip(places, scores, strict=True)
        ]
        found.append(right.index(True) + 1 if any(right) else K + 1)
    return np.array(found)


def share(found: np.ndarray) -> str:
    """Top-20 accuracy with its 95% interval."""
    right = (found <= K).astype(float)
    low, high = interval(right.tolist())
    return f"{right.mean():.1%} ({low:.1%}-{high:.1%})"


def main() -> None:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=4e-3, help="of batches of 32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for seed in range(args.seeds):
        folder = args.out / str(seed)
        folder.mkdir(parents=True)
        data = folder / "questions.json"
        start = random_encoder(write_questions(data, args.questions, seed), folder, seed)
        train, heldout = split(read_questions(data), 0.1, seed)
        collection = list(dict.fromkeys(question.positives[0] for question in (*train, *heldout)))
        print(f"seed {seed}: {len(heldout)} questions, {len(collection)} passages")
        lexical = lexical_ranks(heldout, collection)
        print(f"  BM25                top-{K} {share(lexical)}", flush=True)
        for batch in args.batches:
            recipe = EncoderRecipe(
                data=data,
                encoder=str(start),
                heldout=0.1,
                negatives=0,
                batch_size=batch,
                chunk=256,
                epochs=args.epochs,
                lr=args.lr * (batch / 32) ** 0.5,
                seed=seed,
                device=args.device,
            )
            train_encoder(recipe, folder / f"batch-{batch}")
            found = ranks(TextEncoder.load(folder / f"batch-{batch}", args.device), heldout, collection)
            gains = ((found <= K).astype(float) - (lexical <= K)).tolist()
            low, high = interval(gains)
            print(
                f"  batches of {batch:<8} top-{K} {share(found)}, average rank {found.mean():.1f}, "
                f"above BM25 {np.mean(gains):+.1%} ({low:+.1%} to {high:+.1%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
