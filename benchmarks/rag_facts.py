"""What passages summed out give a small model: facts about invented people, asked with an index and without one.

A decoder of random weights is trained on questions about some people and asked about others. With the index it is
`luban rag train` in both forms; closed-book, it reads the texts about *all* people in training, those it is asked about
among them. Then the index is exchanged for one in which half of the people have moved.

    python benchmarks/rag_facts.py --out runs/facts --seeds 3
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import luban
from luban.core.metrics.answers import exact_match
from luban.models.spec import uniform, write_spec
from luban.nn.feedforward.gated import SwiGLU
from luban.nn.mixer.grouped import Grouped
from luban.retrieval.building import IndexConfig, build_index
from luban.retrieval.documents import DocumentReader
from luban.retrieval.index import Index
from luban.retrieval.passages.document import WholeDocument
from luban.retrieval.rag.asking import RagAsker
from luban.retrieval.rag.decoding import search
from luban.retrieval.rag.generator import Generator
from luban.retrieval.rag.model import load_rag
from luban.retrieval.rag.train import RagRecipe, train_rag
from luban.retrieval.training.optimiser import Optimiser, trainable
from luban.tokenizer.train import train_tokenizer

CITIES = [
    "Lund",
    "Oslo",
    "Pisa",
    "Bern",
    "Riga",
    "Cork",
    "Graz",
    "Lyon",
    "Brno",
    "Split",
    "Turku",
    "Ghent",
    "Porto",
    "Bari",
    "Kiel",
    "Metz",
    "Nice",
    "Linz",
    "York",
    "Bath",
]
CRAFTS = [
    "potter",
    "weaver",
    "baker",
    "tailor",
    "joiner",
    "cooper",
    "smith",
    "miller",
    "mason",
    "dyer",
    "printer",
    "glazier",
]
SYLLABLES = [
    "ba",
    "de",
    "fi",
    "go",
    "hu",
    "ka",
    "le",
    "mi",
    "no",
    "pu",
    "ra",
    "se",
    "ti",
    "vo",
    "zu",
    "lan",
    "mer",
    "tis",
    "vek",
    "dor",
]


@dataclass(frozen=True)
class Person:
    """Somebody invented."""

    name: str
    city: str
    craft: str

    @property
    def text(self) -> str:
        """What is known."""
        return f"{self.name} lives in {self.city} and works as a {self.craft}."

    @property
    def asked(self) -> list[tuple[str, str]]:
        """(question, answer) pairs."""
        return [(f"Where does {self.name} live?", self.city), (f"What is the work of {self.name}?", self.craft)]


def people(rng: random.Random, count: int) -> list[Person]:
    """All with different names."""
    names: dict[str, None] = {}
    while len(names) < count:
        words = ("".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))).capitalize() for _ in range(2))
        names[" ".join(words)] = None
    return [Person(name, rng.choice(CITIES), rng.choice(CRAFTS)) for name in names]


def write_rows(file: Path, rows: list[dict]) -> Path:
    """A .jsonl file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def index_of(everyone: list[Person], folder: Path, name: str, encoder: str) -> Path:
    """An index with a passage about each person."""
    rows = write_rows(folder / f"{name}.jsonl", [{"text": person.text} for person in everyone])
    named = {"retriever": "bm25"} if encoder == "bm25" else {"retriever": "dense", "encoder": encoder}
    build_index(DocumentReader([str(rows)]), folder / name, IndexConfig(rule=WholeDocument(), **named))
    return folder / name


def random_model(everyone: list[Person], folder: Path, seed: int) -> Path:
    """A decoder of random weights with a vocabulary of the texts and questions."""
    texts = [text for person in everyone for text in (person.text, *(q for pair in person.asked for q in pair))]
    tokenizer = train_tokenizer(texts, folder / "tokenizer", vocab_size=600)
    spec = uniform(
        vocab_size=tokenizer.vocab_size,
        width=128,
        layers=4,
        context=128,
        mixer=Grouped(heads=4),
        feedforward=SwiGLU(width=344),
    )
    start = folder / "start"
    start.mkdir()
    write_spec(spec, start)
    save_file(dict(luban.build_model(spec, seed=seed).named_parameters()), start / "model.safetensors")
    shutil.copytree(folder / "tokenizer", start / "tokenizer")
    return start


def closed_book(start: Path, known: list[Person], trained: list[Person], args: argparse.Namespace) -> Generator:
    """Trained on the texts about all people, as answers to a request for them, and on the questions about some."""
    generator = Generator(luban.load_model(start, args.device))
    pairs = [(f"Tell me about {person.name}.", person.text) for person in known]
    pairs += [pair for person in trained for pair in person.asked]
    rng, total = random.Random(args.seed), args.closed_steps
    optimiser = Optimiser(trainable(generator.model.module), lr=args.lr, total=total, clip=1.0)
    for _ in range(total):
        batch = rng.sample(pairs, args.batch_size * args.k)
        logprobs = generator.logprobs(
            [generator.prompt(question, "", 40) for question, _ in batch],
            [generator.answer(answer, 40) for _, answer in batch],
        )
        (-logprobs.sum() / len(batch)).backward()
        optimiser.step()
    generator.model.module.requires_grad_(False)
    return generator


def without_index(generator: Generator, questions: list[tuple[str, str]]) -> float:
    """Share answered right."""
    right = 0.0
    with torch.no_grad():
        for question, answer in questions:
            (said, *_) = search(generator, [generator.prompt(question, "", 40)], torch.zeros(1), 1, 8)
            right += exact_match(generator.text(said), (answer,))
    return right / len(questions)


def run(args: argparse.Namespace, folder: Path) -> list[dict]:
    """The rows of one seed."""
    rng = random.Random(args.seed)
    everyone = people(rng, args.people)
    trained, asked = everyone[: -args.asked], everyone[-args.asked :]
    index = index_of(everyone, folder, "index", args.encoder)
    moved = [
        replace(person, city=rng.choice([c for c in CITIES if c != person.city])) if i % 2 else person
        for i, person in enumerate(asked)
    ]
    swapped = index_of([*trained, *moved], folder, "swapped", args.encoder)
    rows = [{"question": q, "answers": [a]} for person in trained for q, a in person.asked]
    data = write_rows(folder / "questions.jsonl", rows)
    start = random_model(everyone, folder, args.seed)
    questions = [pair for person in asked for pair in person.asked]
    closed = without_index(closed_book(start, everyone, trained, args), questions)
    found = [{"seed": args.seed, "model": "closed book", "exact_match": closed}]
    print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    for kind in ("sequence", "token"):
        recipe = RagRecipe(
            data=data,
            index=index,
            model=str(start),
            marginal=kind,
            k=args.k,
            temperature=1.0 if args.encoder == "bm25" else 0.05,
            heldout=0.0,
            batch_size=args.batch_size,
            epochs=args.epochs,
            lr=args.lr,
            answer_tokens=8,
            seed=args.seed,
            device=args.device,
        )
        figures = train_rag(recipe, folder / kind)
        rag = load_rag(folder / kind, args.device)
        before, after = (
            RagAsker(Index(path, device=args.device), rag, beams=2, max_tokens=8) for path in (index, swapped)
        )
        said = [(before.ask(q).written, after.ask(q).written) for q, _ in questions]
        new = [pair for person in moved for pair in person.asked]
        changed = [old != now for old, now in zip(questions, new, strict=True)]
        followed = [s[1] == now[1] for s, now, c in zip(said, new, changed, strict=True) if c]
        others = [s[0] == s[1] for s, c in zip(said, changed, strict=True) if not c]
        found.append(
            {
                "seed": args.seed,
                "model": f"RAG-{kind.capitalize()}",
                "exact_match": sum(s[0] == answer for s, (_, answer) in zip(said, questions, strict=True)) / len(said),
                "new_facts_followed": sum(followed) / len(followed),
                "others_unchanged": sum(others) / len(others),
                "loss": [figures["first_loss"], figures["last_loss"]],
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Run the seeds and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--people", type=int, default=800)
    parser.add_argument("--asked", type=int, default=100, help="of them, never asked about in training")
    parser.add_argument("--encoder", default="bm25", help="of the index: bm25, or a sentence encoder such as minilm")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--closed-steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows = []
    for seed in range(args.seeds):
        args.seed, folder = seed, args.out / str(seed)
        folder.mkdir(parents=True)
        rows += run(args, folder)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
