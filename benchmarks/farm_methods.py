"""The methods of benchmarks/alpaca_farm.py, each through the commands that a user calls."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from toy_runs import ToyRuns, exchange

from luban.align.feedback import conditioned_prompt
from luban.align.overoptimisation import overoptimisation_report
from luban.core.metrics.bootstrap import interval

METHODS = ("sft", "feedme", "conditioned", "best_of_16", "expert", "quark", "dpo", "ppo")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is spent; the same for every method."""

    steps: dict[str, int]  # verb → of a training: about three passes over conversations, two over pairs
    batch: int  # conversations or pairs a step
    answers: int  # of a round of PPO and Quark
    max_tokens: int  # of an answer
    longest: int  # characters of a published prompt or answer; pairs with a longer one are left out
    rates: dict[str, str]  # verb → learning rate
    recipe: str  # cpu or gpu: which of the shipped recipes
    flags: tuple[object, ...] = ()  # of every training
    device: str = "cpu"


class Farm(ToyRuns):
    """Methods from one start. A subclass has the prompts, the labels and the gold reward."""

    start: str | Path  # the model
    labelled: list[str]  # prompts with labels
    unlabelled: list[str]  # prompts without
    held: list[str]  # prompts that are measured on

    def __init__(self, folder: Path, seed: int, sizes: Sizes):
        super().__init__(folder, seed)
        self.sizes, self.seconds = sizes, dict[str, float]()

    def gold(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """What answers are worth."""
        raise NotImplementedError

    def labels(self) -> Path:
        """Pairs of the start's answers with the annotators' choices, as .jsonl."""
        raise NotImplementedError

    def trained(self, name: str, verb: str, data: Path, *more: object, start: str | Path = "") -> Path:
        """A run of a verb by the shipped recipe, with what every method spends."""
        sizes, began = self.sizes, time.perf_counter()
        out = self.tuned(
            name,
            verb,
            start or self.start,
            data,
            *(*sizes.flags, *more),
            steps=sizes.steps[verb],
            lr=sizes.rates[verb],
            batch=sizes.answers // 2 if verb == "rl" else sizes.batch,
            recipe=sizes.recipe,
        )
        self.seconds[name] = time.perf_counter() - began
        return out

    def converted(self, rows: Path, use: str) -> Path:
        """Labels as data for a use of them."""
        out = rows.with_name(f"{use}.jsonl")
        self.luban("data", "feedback", rows, "--use", use, "--out", out)
        return out

    def best_of(self, prompts: Sequence[str], name: str) -> list[str]:
        """The start's best answer of 16 by the reward model to each prompt."""
        asked = self.write(f"{name}-prompts.jsonl", [{"prompt": p} for p in prompts])
        out, began = self.folder / f"{name}.jsonl", time.perf_counter()
        self.luban(
            *("generate", self.start, asked, "--best-of", 16, "--reward", self.folder / "reward", "--out", out),
            *("--temperature", 1, "--max-tokens", self.sizes.max_tokens, "--seed", self.seed),
            *("--device", self.sizes.device, "--dtype", "bfloat16" if self.sizes.device == "cuda" else "float32"),
        )
        self.seconds[name] = time.perf_counter() - began
        found = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
        by_prompt = {messages[0]["content"]: messages[-1]["content"] for messages in found}
        return [by_prompt[p] for p in prompts]

    def said(self, model: str | Path, prompts: Sequence[Any]) -> list[str]:
        """An answer to each prompt at temperature 1."""
        found = self.answers(model, prompts, max_tokens=self.sizes.max_tokens, seed=self.seed, device=self.sizes.device)
        return [texts[0] for texts in found]

    def highest(self, prompts: Sequence[str], most: int) -> list[Any]:
        """Prompts that ask for the highest of `most` scores."""
        return [conditioned_prompt(p, most, most) for p in prompts]

    def answers_of(self) -> dict[str, list[str]]:
        """What every method answers to the held-out prompts."""
        pairs, held = self.labels(), self.held
        found = {"sft": self.said(self.start, held)}
        found["feedme"] = self.said(self.trained("feedme", "sft", self.converted(pairs, "preferred")), held)
        rated = self.converted(pairs, "conditioned")
        most = int(rated.read_text().partition("from 1 to ")[2].partition(":")[0])
        found["conditioned"] = self.said(self.trained("conditioned", "sft", rated), self.highest(held, most))
        found["dpo"] = self.said(self.trained("dpo", "dpo", pairs), held)
        reward = self.trained("reward", "reward", pairs)
        found["best_of_16"] = self.best_of(held, "best_of_16")
        best = zip(self.unlabelled, self.best_of(self.unlabelled, "unlabelled"), strict=True)
        chosen = self.write("expert-chosen.jsonl", [exchange(p, a) for p, a in best])
        found["expert"] = self.said(self.trained("expert", "sft", chosen), held)
        prompts = self.write("rl-prompts.jsonl", [{"prompt": p} for p in self.unlabelled])
        rounds = ("--reward", reward, "--rl.max_tokens", self.sizes.max_tokens, "--validation.every", 0)
        samples = ("--rl.prompts", self.sizes.answers, "--rl.samples", 1, "--rl.kl", "0.02")
        ppo = self.trained("ppo", "rl", prompts, "--rl.type", "ppo", *samples, *rounds)
        found["ppo"] = self.said(ppo, held)
        quark = self.trained("quark", "rl", prompts, "--rl.type", "quark", *samples, *rounds)
        found["quark"] = self.said(quark, self.highest(held, 5))
        return {name: found[name] for name in METHODS}

    def measured(self) -> dict[str, dict[str, Any]]:
        """Gold value and win rate against the start of every method."""
        found = self.answers_of()
        values = {name: self.gold(self.held, answers, name) for name, answers in found.items()}
        table = {}
        for name, value in values.items():
            wins = (value > values["sft"]) + 0.5 * (value == values["sft"])
            table[name] = {
                "gold": float(value.mean()),
                "win_rate": float(wins.mean()),
                "interval": interval(wins.tolist()),
                "seconds": self.seconds.get(name, 0.0),
            }
        return table

    def overoptimised(self, prompts: int, answers: int) -> dict[str, dict[str, float]]:
        """Gao's curves of the reward model as a proxy for gold: both score the start's answers to held-out prompts."""
        asked = self.held[:prompts]
        given = self.answers(
            self.start, asked, answers, max_tokens=self.sizes.max_tokens, seed=self.seed, device=self.sizes.device
        )
        pairs = [(prompt, text or ".") for prompt, texts in zip(asked, given, strict=True) for text in texts]
        rows = self.write("to-score.jsonl", [{"prompt": p, "completion": text} for p, text in pairs])
        out = self.folder / "by-proxy.jsonl"
        self.luban("score", self.folder / "reward", rows, "--out", out, "--device", self.sizes.device)
        proxy = [json.loads(line)["score"] for line in out.read_text().splitlines()]
        gold = self.gold([p for p, _ in pairs], [text for _, text in pairs], "proxied").tolist()
        both = [{"prompt": p, "proxy": a, "gold": b} for (p, _), a, b in zip(pairs, proxy, gold, strict=True)]
        fits = overoptimisation_report(self.write("both.jsonl", both), self.folder / "overoptimisation.html")
        return {
            name: {key: getattr(fit, key) for key in ("alpha", "beta", "r_squared", "peak")}
            for name, fit in fits.items()
        }
