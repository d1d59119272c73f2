"""One altered sentence in a book of 72,000 tokens: a model that reads so far is trained, and finds it (`luban eval … altered_sentence`).

    python benchmarks/altered_books.py --out books                    # for one H100 and ten minutes of training; not run on one yet
    python benchmarks/altered_books.py --out books --small            # two CPU cores: books of 2,000 tokens

The books are made up: sentences of weather and roads, and now and then a fact of one of many people ("Mara's lantern is amber."). Everybody
appears in many books, with facts of its own, and a fact that is told again is told the same. In a book that is read, one fact is told
otherwise near the end: as good a sentence as any, which only who remembers the fact knows to be wrong. Facts come in two halves that
take turns, each in a random order, so that in 72,000 tokens the last mention lies thousands of tokens back: with a window of 4,096 tokens
little can be known.

Rows grow: a model that has learned to look facts up over a thousand tokens learns it over 72,000 soon. Books of every length are read then:
rank of the altered sentence, with the whole book in view and with the window. Writes OUT/result.json; exits 1 where in the books but
one from the longest the altered sentence is first in fewer than 8 of 10, or, but for --small, the window ranks it as well.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy_runs import ToyRuns, concluded

NAMES = [
    a + b
    for a in ["Ba", "Do", "Fe", "Gi", "Ha", "Ju", "Ka", "Lo", "Ma", "Ni", "Po", "Ra", "Sa", "Te", "Vo", "Wi"]
    for b in ["ra", "lin", "mo", "sk", "ta", "ven", "dor", "na"]
]
THINGS = [
    "lantern",
    "horse",
    "coat",
    "boat",
    "knife",
    "door",
    "cup",
    "drum",
    "book",
    "ring",
    "field",
    "tower",
    "dog",
    "hat",
    "bell",
    "wagon",
]
VALUES = [
    "red",
    "blue",
    "green",
    "white",
    "black",
    "grey",
    "brown",
    "amber",
    "silver",
    "golden",
    "old",
    "new",
    "small",
    "large",
    "heavy",
    "light",
    "broken",
    "lost",
    "borrowed",
    "stolen",
    "hidden",
    "painted",
    "empty",
    "full",
    "narrow",
    "round",
    "warm",
    "cold",
    "cheap",
    "dear",
    "loud",
    "quiet",
]
WHO = [
    "the wind",
    "the rain",
    "a cart",
    "the road",
    "the river",
    "a rider",
    "the snow",
    "the miller",
    "a cloud",
    "the market",
]
DID = [
    "came down from",
    "went on to",
    "was heard in",
    "passed",
    "lay before",
    "turned towards",
    "stopped at",
    "was late in",
]
PLACE = ["the hills", "the bridge", "the north", "the old mill", "the harbour", "the town", "the woods", "the valley"]
MENTIONS = 4  # of a fact, in a row or a book
WORDS = 8  # tokens of a sentence, about


@dataclass(frozen=True)
class Stage:
    """Part of the training."""

    tokens: int  # of a row
    rows: int  # of a step
    steps: int
    lr: str
    share: float = 0.15  # of sentences that tell a fact


@dataclass(frozen=True)
class Size:
    """Model, rows and books."""

    stages: tuple[Stage, ...]
    lengths: tuple[int, ...]  # tokens of the books that are read
    model: tuple[str, ...]
    flags: tuple[str, ...]
    books: int  # of each length
    names: int  # people
    things: int  # that each may have


GPU = Size(
    (Stage(1024, 256, 1500, "4e-3", 1.0), Stage(8192, 32, 400, "2e-3", 0.5), Stage(73_728, 4, 250, "1e-3")),
    (8192, 16_384, 32_768, 73_000, 100_000),
    (
        "--model.width",
        "256",
        "--model.layers",
        "4",
        "--model.layer.mixer.heads",
        "4",
        "--model.layer.feedforward.width",
        "768",
    ),
    ("--train.device", "cuda", "--train.precision", "bf16", "--train.compile", "true"),
    10,
    128,
    16,
)
CPU = Size(
    (Stage(256, 32, 1500, "4e-3", 1.0), Stage(2048, 4, 150, "2e-3")),
    (1000, 2000, 4000),
    (
        "--model.width",
        "96",
        "--model.layers",
        "2",
        "--model.layer.mixer.heads",
        "4",
        "--model.layer.feedforward.width",
        "256",
    ),
    ("--train.device", "cpu", "--train.precision", "fp32", "--train.compile", "true"),
    10,
    16,
    4,
)


class Author:
    """Writes books of one cast.

    Args:
        names, things: how many people, and how many things each may have.
    """

    def __init__(self, names: int, things: int, rng: random.Random):
        self.rng = rng
        self.keys = [f"{name}'s {thing}" for name in NAMES[:names] for thing in THINGS[:things]]

    def book(self, tokens: int, row: int, share: float = Stage.share) -> list[tuple[str, str]]:
        """Sentences of about so many tokens, each with what it tells of: a key, or nothing. Facts are told `MENTIONS` times in
        every `row` of them."""
        rng, text = self.rng, []
        count = min(len(self.keys), max(2, round(row / WORDS * share / MENTIONS)))
        facts = [(f"{key} is {rng.choice(VALUES)}.", key) for key in rng.sample(self.keys, count)]
        halves, told, turn = (facts[: count // 2], facts[count // 2 :]), [], 0
        for _ in range(tokens // WORDS):
            if rng.random() >= share:
                line = f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(PLACE)}."
                text.append((line[0].upper() + line[1:], ""))
                continue
            if not told:
                told = rng.sample(halves[turn], len(halves[turn]))
                turn = 1 - turn
            text.append(told.pop())
        return text

    def altered(self, tokens: int) -> dict[str, Any]:
        """A row of a book in whose last tenth a fact that was told before is to be told otherwise."""
        text = self.book(tokens, tokens)
        late = [i for i in range(len(text) * 9 // 10, len(text)) if text[i][1] and text[i] in text[: len(text) // 2]]
        i = self.rng.choice(late)
        line, key = text[i]
        other = self.rng.choice([value for value in VALUES if line != f"{key} is {value}."])
        start = sum(len(sentence) + 1 for sentence, _ in text[:i])
        place = {"start": start, "stop": start + len(line), "text": f"{key} is {other}."}
        return {"text": joined(text), "meta": {"altered": place}}


def joined(sentences: list[tuple[str, str]]) -> str:
    """The text."""
    return " ".join(sentence for sentence, _ in sentences)


class Books(ToyRuns):
    """The runs of one folder."""

    def __init__(self, folder: Path, size: Size, seed: int):
        super().__init__(folder, seed, shown=True)
        self.size = size

    def author(self, what: str) -> Author:
        """Of one kind of books."""
        return Author(self.size.names, self.size.things, random.Random(f"{self.seed} {what}"))

    def shards(self, number: int, stage: Stage) -> Path:
        """Rows of a stage: books four rows long, as many as are read once."""
        name = self.folder / f"shards-{number}"
        return self.once(name, lambda: self._pack(number, stage, name))

    def _pack(self, number: int, stage: Stage, out: Path) -> None:
        author, most = self.author(str(number)), 60_000_000 // (4 * stage.tokens)
        books = max(8, min(stage.rows * stage.steps // 4, most))
        texts = [{"text": joined(author.book(4 * stage.tokens, stage.tokens, stage.share))} for _ in range(books)]
        corpus = self.folder / f"corpus-{number}"
        self.luban(
            "corpus",
            "build",
            self.write(f"books-{number}.jsonl", texts),
            "--out",
            corpus,
            "--heldout",
            0.01,
            "--steps",
            "",
        )
        tok = self.folder / "tok"
        self.once(tok, lambda: self.luban("tokenizer", "train", corpus, "--out", tok, "--vocab-size", 1024))
        self.luban("data", "pack", corpus, "--tokenizer", tok, "--out", out)

    def model(self) -> Path:
        """Trained stage after stage."""
        run: Path | None = None
        context = 2 * max(max(s.tokens for s in self.size.stages), *self.size.lengths)
        for number, stage in enumerate(self.size.stages):
            shards, out = self.shards(number, stage), self.folder / f"model-{number}"
            words: list[object] = [
                "pretrain",
                "luban_pretrain_cpu",
                "--data.path",
                shards,
                "--out",
                out,
                *self.size.flags,
            ]
            if run is None:
                words += [
                    *self.size.model,
                    "--model.context",
                    context,
                    "--model.position.base",
                    1e6,
                    "--model.layer.mixer.qk_norm.type",
                    "rmsnorm",
                ]
            else:
                words += ["--init", run]
            words += [
                "--train.seq_len",
                stage.tokens,
                "--train.batch_size",
                stage.rows,
                "--train.steps",
                stage.steps,
                "--train.epochs",
                100,
            ]
            words += [
                "--train.seed",
                self.seed,
                "--optim.lr",
                stage.lr,
                "--checkpoint.every",
                100_000,
                "--validation.every",
                100,
                "--validation.batches",
                4,
            ]
            run = self.once(out, lambda words=words: self.luban(*words))
        assert run is not None
        return run

    def found(self, model: Path, tokens: int) -> dict[str, float]:
        """What `luban eval` says about books of one length."""
        out = self.folder / f"eval-{tokens}"
        self.once(out, lambda: self._evaluate(model, tokens, out))
        return {
            name: row["value"]
            for name, row in json.loads((out / "results.json").read_text()).items()
            if name.startswith("altered")
        }

    def _evaluate(self, model: Path, tokens: int, out: Path) -> None:
        author = self.author(f"read {tokens}")
        texts = [author.altered(tokens) for _ in range(2 * self.size.books + 2)]
        corpus = self.folder / f"read-{tokens}"
        self.luban(
            "corpus",
            "build",
            self.write(f"read-{tokens}.jsonl", texts),
            "--out",
            corpus,
            "--heldout",
            0.6,
            "--steps",
            "",
        )
        device = self.size.flags[1]
        self.luban(
            "eval",
            model,
            "altered_sentence",
            "--corpus",
            corpus,
            "--limit",
            self.size.books,
            "--out",
            out,
            "--device",
            device,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder; what is in it already is taken as it is")
    parser.add_argument("--small", action="store_true", help="books of 2,000 tokens, on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = CPU if args.small else GPU
    study, began = Books(args.out, size, args.seed), time.perf_counter()
    model = study.model()
    print(f"trained after {time.perf_counter() - began:.0f} s, books and packing included", flush=True)
    rows = {}
    for tokens in size.lengths:
        rows[tokens] = found = study.found(model, tokens)
        print(
            f"{tokens:7} tokens: first in {found['altered_whole_first']:.0%} of the books (mean rank {found['altered_whole_rank']:.1f}), by the window in "
            f"{found['altered_window_first']:.0%} ({found['altered_window_rank']:.1f}); {found['altered_seconds']:.2f} s a book",
            flush=True,
        )
    asked = rows[size.lengths[-2]]
    checks = {
        f"at {size.lengths[-2]} tokens the altered sentence is first in 8 of 10 books": asked["altered_whole_first"]
        >= 0.8,
    }
    if not args.small:
        checks["the window ranks it lower"] = asked["altered_window_rank"] > asked["altered_whole_rank"]
    return concluded(checks, str(args.out / "result.json"), quick=False, lengths=rows, seconds=study.seconds)


if __name__ == "__main__":
    sys.exit(main())
