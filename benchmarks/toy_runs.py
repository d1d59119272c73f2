"""Small models that go through Luban's commands in a folder of their own, for the scripts that compare methods on toys."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import luban
from luban.align.prompts import prompt_ids
from luban.align.rollout import Sampler
from luban.cli.main import main as command_line
from luban.core.artifact import atomic_write
from luban.core.seeding import derive

TRAIN = ("--train.seq_len", "64", "--train.compile", "false", "--train.precision", "fp32")
TOGETHER = 512  # answers that are written at once
Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The time that was given is over; names the stage that wasn't begun."""


class ToyRuns:
    """A folder of files and runs, each of which is made once: what is there already is taken as it is.

    Args:
        folder: of them.
        seed: of every training.
        deadline: of `time.perf_counter()`, after which nothing new is begun.
        shown: whether each stage's seconds are printed.
    """

    def __init__(self, folder: Path, seed: int, *, deadline: float = math.inf, shown: bool = False):
        self.folder, self.seed, self.deadline, self.shown = folder, seed, deadline, shown
        folder.mkdir(parents=True, exist_ok=True)
        times = folder / "seconds.json"
        self.seconds: dict[str, float] = json.loads(times.read_text()) if times.exists() else {}

    def once(self, made: Path, make: Callable[[], object]) -> Path:
        """`made`, a file or a run, which `make` writes unless it is there. Raises OutOfTimeError behind the deadline."""
        if made.exists():
            return made
        name, began = str(made.relative_to(self.folder)), time.perf_counter()
        if began > self.deadline:
            raise OutOfTimeError(name)
        make()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.seconds[name] = round(time.perf_counter() - began, 2)
        atomic_write(self.folder / "seconds.json", json.dumps(self.seconds))
        if self.shown:
            print(f"{self.folder.name}/{name}: {self.seconds[name]:.1f} s", flush=True)
        return made

    def luban(self, *words: object) -> None:
        """Run a command; its output goes to the file `log`. Raises SystemExit with the end of that where it fails."""
        with (self.folder / "log").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            code = command_line([str(word) for word in words])
        if code:
            end = "\n".join((self.folder / "log").read_text().splitlines()[-3:])
            raise SystemExit(f"luban {' '.join(map(str, words))} failed:\n{end}")

    def write(self, name: str, rows: Sequence[Row]) -> Path:
        """A .jsonl file in the folder."""
        path = self.folder / name
        atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        return path

    def first_model(self, pages: Sequence[str], steps: int = 30) -> Path:
        """A model pretrained for a few steps on pages of text, with a tokenizer of their bytes."""
        return self.once(self.folder / "base", lambda: self._first_model(pages, steps))

    def _first_model(self, pages: Sequence[str], steps: int) -> None:
        f = self.folder
        self.write("pages.jsonl", [{"text": page} for page in pages])
        self.luban("corpus", "build", f / "pages.jsonl", "--out", f / "corpus")
        self.luban("tokenizer", "train", f / "corpus", "--out", f / "tok", "--vocab-size", 272)
        self.luban("data", "pack", f / "corpus", "--tokenizer", f / "tok", "--out", f / "shards")
        words = ("--data.path", f / "shards", "--out", f / "base", "--train.steps", steps, "--train.seed", self.seed)
        self.luban("pretrain", "tiny_pretrain_cpu", *words)

    def letters_model(self, steps: int = 240, *, reads: bool = False) -> Path:
        """A chat model that answers "write NUMBER" with six random letters.

        Args:
            reads: three quarters of its conversations ask in a sentence for 1 to 6 letters, so that it learns to read its prompts.
        """
        rng = random.Random(self.seed)
        words = random_words(2400, 6, rng)
        base = self.first_model([" ".join(words[i : i + 50]) for i in range(0, len(words), 50)])
        chats = [exchange(f"write {i}", word) for i, word in enumerate(words)]
        if reads:
            wanted = [rng.randint(1, 6) if i % 4 else 0 for i in range(len(words))]
            chats = [
                exchange(f"Letters wanted: {n}.\nwrite {i}", words[i][:n]) if n else chats[i]
                for i, n in enumerate(wanted)
            ]
        name = "reading" if reads else "start"
        return self.tuned(name, "sft", base, self.write(f"{name}-chats.jsonl", chats), steps=steps, lr="3e-3")

    def tuned(
        self,
        name: str,
        verb: str,
        start: str | Path,
        data: Path,
        *more: object,
        steps: int,
        lr: str,
        batch: int = 16,
        recipe: str = "cpu",
    ) -> Path:
        """A run of a verb that trains, by the recipe luban_VERB_cpu or luban_VERB_gpu."""
        out = self.folder / name
        words: list[object] = [
            "--train.steps",
            steps,
            "--train.seed",
            self.seed,
            "--optim.lr",
            lr,
            "--train.batch_size",
            batch,
        ]
        words += ["--checkpoint.every", 10_000, "--train.log_every", 1]
        if recipe == "cpu":
            words += TRAIN[:2] + TRAIN[4:] if verb == "rl" else TRAIN
        words = [verb, f"luban_{verb}_{recipe}", "--init", start, "--data.path", data, "--out", out, *words, *more]
        return self.once(out, lambda: self.luban(*words))

    def answers(
        self,
        model: str | Path,
        prompts: Sequence[Any],
        n: int = 1,
        *,
        temperature: float = 1.0,
        max_tokens: int = 12,
        seed: int,
        device: str = "cpu",
    ) -> list[list[str]]:
        """`n` answers a prompt, which is text or messages."""
        loaded = luban.load_model(model, device, "bfloat16" if device == "cuda" else "float32")
        chats = [p if isinstance(p, list) else [{"role": "user", "content": p}] for p in prompts]
        ids = [prompt_ids(chat, loaded.need_tokenizer()) for chat in chats]
        sampling = luban.Sampling(n=n, max_tokens=max_tokens, temperature=temperature, seed=seed)
        found: list[list[str]] = []
        together = max(1, TOGETHER // n)
        sampler = Sampler(loaded, loaded.module, min(together, len(ids)) * n, max(map(len, ids)) + max_tokens)
        for start in range(0, len(ids), together):  # the sampler gives every prompt draws of its own
            taken = ids[start : start + together]
            texts = sampler.write(taken, replace(sampling, seed=derive(seed, "answers", start))).texts
            found += [texts[i : i + n] for i in range(0, len(texts), n)]
        return found


def exchange(question: str, answer: str) -> Row:
    """A row of one question and its answer, as `luban sft` takes it."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def random_words(count: int, length: int, rng: random.Random) -> list[str]:
    """Different words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length))] = None
    return list(found)


def concluded(checks: dict[str, bool], out: str, *, quick: bool, **found: Any) -> int:
    """Print which checks held and write them with what was found; the exit code, 0 for a quick run whatever they say."""
    for name, held in checks.items():
        print(f"{'held  ' if held else 'FAILED'} {name}")
    Path(out).write_text(json.dumps({**found, "checks": checks}, indent=1) + "\n")
    return 0 if all(checks.values()) or quick else 1
