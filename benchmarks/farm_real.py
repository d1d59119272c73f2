"""The real loop of benchmarks/alpaca_farm.py: instructions, a chat model, reward models of published preferences."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from farm_methods import NOISE, Farm, Sizes
from toy_runs import Row, ToyRuns

from luban.core.artifact import read_manifest
from luban.core.jsonl import read_rows

TAXED = ("sft", "feedme", "expert", "dpo", "ppo")  # methods whose models are evaluated before and after
TASK = """
data = "published.jsonl"
prompt = ""
target = "{{text}}"

[kind]
type = "rolling"
"""
GPU = Sizes(
    prompts=302,
    held=200,
    pairs=8,
    steps={"sft": 60, "reward": 150, "dpo": 75, "rl": 80},
    batch={"sft": 32, "reward": 32, "dpo": 32, "rl": 128},
    rates={"sft": "5e-5", "reward": "3e-5", "dpo": "1e-5", "rl": "1e-5"},
    best_of=16,
    kl=0.01,
    max_tokens=200,
    curve=(64, 32),
    recipe="gpu",
    flags=("--train.compile", "false", "--train.seq_len", 640),
    more={
        "sft": ("--validation.every", 0, "--validation.patience", 0, "--train.accumulate", 2),
        "reward": ("--validation.every", 0, "--train.accumulate", 4),
        "dpo": ("--validation.every", 0, "--train.accumulate", 4),
        "rl": ("--train.accumulate", 8),
    },
    device="cuda",
)
SMALL = replace(  # about half an H100's time of GPU
    GPU,
    prompts=200,
    held=128,
    pairs=6,
    steps={"sft": 40, "reward": 100, "dpo": 50, "rl": 48},
    max_tokens=128,
    curve=(32, 32),
)
TINY = Sizes(
    prompts=12,
    held=8,
    pairs=2,
    steps={"sft": 2, "reward": 2, "dpo": 2, "rl": 4},
    batch={"sft": 4, "reward": 4, "dpo": 4, "rl": 4},
    rates=GPU.rates,
    best_of=2,
    expert_of=2,
    kl=GPU.kl,
    max_tokens=12,
    curve=(4, 8),
    flags=("--train.seq_len", 640),
    more={
        "reward": ("--validation.every", 0, "--train.accumulate", 2),
        "dpo": ("--validation.every", 0, "--train.accumulate", 2),
        "sft": ("--train.accumulate", 2),
        "rl": ("--train.accumulate", 2),
    },
)


class Judges(ToyRuns):
    """Two reward models of AlpacaEval's pairs: one labels, the other, which knows other instructions, measures. Instructions
    that are measured on are known to neither.

    Args:
        file: the pairs, as GPT-4 judged them.
        model: that the reward models start from.
        pairs: that each is trained on.
        longest: characters of a prompt or an answer; pairs with a longer one are left out.
        held: instructions that are measured on.
    """

    def __init__(
        self, folder: Path, sizes: Sizes, file: Path, model: str, pairs: int, longest: int, steps: int, **given: Any
    ):
        super().__init__(folder, 0, **given)
        self.sizes, self.model, self.count, self.steps = sizes, model, pairs, steps
        texts = ("instruction", "output_1", "output_2")
        self.rows = [row for _, row in read_rows(file) if max(len(row[name]) for name in texts) <= longest]
        known = sorted({row["instruction"] for row in self.rows})
        random.Random(0).shuffle(known)
        self.held, self.rest = known[: sizes.held], known[sizes.held :]

    def trained(self, name: str, instructions: Sequence[str]) -> Path:
        """A reward model of the pairs of some instructions."""
        if (self.folder / name).exists():
            return self.folder / name
        known = set(instructions)
        judged = [self.pair(row) for row in self.rows if row["instruction"] in known]
        rows = [row for row in judged if row]
        random.Random(0).shuffle(rows)
        data, sizes = self.write(f"{name}.jsonl", rows[: self.count]), self.sizes
        return self.tuned(
            name,
            "reward",
            self.model,
            data,
            *(*sizes.flags, *sizes.more["reward"]),
            steps=self.steps,
            lr=sizes.rates["reward"],
            batch=sizes.batch["reward"],
            recipe=sizes.recipe,
        )

    @property
    def annotator(self) -> Path:
        """The one that labels."""
        return self.trained("annotator", self.rest[::2])

    @property
    def judge(self) -> Path:
        """The one that measures."""
        return self.trained("judge", self.rest[1::2])

    def pair(self, row: Row) -> Row | None:
        """A row of preferences; None for a tie."""
        better = {"1": "output_1", "2": "output_2"}.get(str(row["preferred"]))
        if better is None:
            return None
        worse = "output_2" if better == "output_1" else "output_1"
        return {"prompt": row["instruction"], "chosen": row[better], "rejected": row[worse]}

    def figures(self) -> dict[str, Any]:
        """What both reached on pairs that were held out."""
        names = ("accuracy", "longer_wins", "accuracy_similar_length", "length_correlation")
        found = {}
        for run in (self.annotator, self.judge):
            figures = read_manifest(run).figures
            found[run.name] = {name: figures[name] for name in names}
        return found

    def published(self, most: int) -> list[str]:
        """Answers to instructions that are measured on, one each, for the alignment tax."""
        found = {row["instruction"]: row["output_1"] for row in self.rows}
        return [found[instruction] for instruction in self.held[:most]]


class RealFarm(Farm):
    """One seed."""

    def __init__(self, folder: Path, seed: int, sizes: Sizes, judges: Judges, **given: Any):
        super().__init__(folder, seed, sizes, **given)
        self.judges, self.start, self.held = judges, judges.model, judges.held
        rest = random.Random(seed).sample(judges.rest, len(judges.rest))
        self.labelled, self.unlabelled = rest[: sizes.prompts], rest[sizes.prompts :][: sizes.prompts]

    def gold(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """Scores of the reward model that labels."""
        return self.scored(self.judges.annotator, prompts, answers, name)

    def judged(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """Scores of the reward model that measures."""
        return self.scored(self.judges.judge, prompts, answers, f"{name}-judged")

    def pairs(self) -> Path:
        """Pairs labelled by `luban annotate`."""
        out, sizes = self.folder / "labels", self.sizes
        if not out.exists():
            rows = [
                {"prompt": prompt, "output_1": first or ".", "output_2": second or "."}
                for prompt, (first, second) in self.two_by_two()
            ]
            pool, file = self.folder / "pool.toml", self.write("to-label.jsonl", rows)
            judges = "".join(f'[[annotator]]\nname = "gold {i}"\nmodel = "gold"\n\n' for i in range(3))
            pool.write_text(
                f'noise = {NOISE}\n\n{judges}[[annotator]]\nname = "length"\nmodel = "rule:longest"\n\n[models]\ngold = ""\n'
            )
            words = ("annotate", file, "--pool", pool, "--models", f"gold={self.judges.annotator}")
            more = ("--everyone", min(50, len(rows)), "--seed", self.seed, "--device", sizes.device, "--out", out)
            self.once(out, lambda: self.luban(*words, *more))
        return out / "preferences.jsonl"

    def agreement(self) -> dict[str, Any]:
        """Of the labels, and what the reward models reached."""
        self.pairs()
        found = json.loads((self.folder / "labels" / "agreement.json").read_text())
        return found | self.judges.figures() | {"reward model with held-out labels": self.held_out_accuracy()}

    def tax(self, methods: Sequence[str], items: int) -> Path:
        """A page of what every method's model lost and gained beside the start: sums with five examples, and bits a byte of
        published answers to instructions that are measured on."""
        folder = self.folder / "tax"
        folder.mkdir(exist_ok=True)
        text = "".join(json.dumps({"text": text}) + "\n" for text in self.judges.published(items))
        (folder / "published.jsonl").write_text(text)
        (folder / "published.toml").write_text(TASK)
        measured = []
        for name in (name for name in TAXED if name in methods or name == "sft"):
            model, out = self.model_of(name), folder / name
            tasks = ("arithmetic_add_2", "arithmetic_subtract_2", folder / "published.toml")
            words = (
                "eval",
                model,
                *tasks,
                "--shots",
                5,
                "--limit",
                items,
                "--device",
                self.sizes.device,
                "--cache-gb",
                2,
            )
            measured.append(self.once(out, lambda words=words, out=out: self.luban(*words, "--out", out)))
        page = self.folder / "tax.html"
        page.unlink(missing_ok=True)
        self.luban("report", *measured, "--out", page)
        return page
