"""Small models that go through Luban's commands in a folder of their own, for the scripts that compare methods on toys."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import luban
from luban.align.prompts import prompt_ids
from luban.align.rollout import Sampler
from luban.cli.main import main as command_line
from luban.core.seeding import derive

TRAIN = ("--train.seq_len", "64", "--train.compile", "false", "--train.precision", "fp32")
TOGETHER = 256  # prompts that are answered at once
Row = dict[str, Any]


class ToyRuns:
    """A folder of files and runs.

    Args:
        folder: of them.
        seed: of every training.
    """

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        folder.mkdir(parents=True, exist_ok=True)

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
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def first_model(self, pages: Sequence[str], steps: int = 30) -> Path:
        """A model pretrained for a few steps on pages of text, with a tokenizer of their bytes."""
        f = self.folder
        self.write("pages.jsonl", [{"text": page} for page in pages])
        self.luban("corpus", "build", f / "pages.jsonl", "--out", f / "corpus")
        self.luban("tokenizer", "train", f / "corpus", "--out", f / "tok", "--vocab-size", 272)
        self.luban("data", "pack", f / "corpus", "--tokenizer", f / "tok", "--out", f / "shards")
        words = ("--data.path", f / "shards", "--out", f / "base", "--train.steps", steps, "--train.seed", self.seed)
        self.luban("pretrain", "tiny_pretrain_cpu", *words)
        return f / "base"

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
        words += more
        self.luban(verb, f"luban_{verb}_{recipe}", "--init", start, "--data.path", data, "--out", out, *words)
        return out

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
        for start in range(0, len(ids), TOGETHER):  # the sampler gives every prompt draws of its own
            taken = ids[start : start + TOGETHER]
            longest = max(map(len, taken)) + max_tokens
            sampler = Sampler(loaded, loaded.module, len(taken) * n, longest)
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
