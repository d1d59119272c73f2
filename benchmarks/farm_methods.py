"""The methods of benchmarks/alpaca_farm.py, each through the commands that a user calls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from toy_runs import ToyRuns, exchange

from luban.align.feedback import conditioned_prompt
from luban.align.overoptimisation import overoptimisation_report
from luban.core.artifact import read_manifest
from luban.core.errors import DataError
from luban.core.metrics.bootstrap import interval

METHODS = ("sft", "feedme", "conditioned", "best_of_n", "expert", "dpo", "ppo", "quark")
QUANTILES = 5  # of Quark's scores
NOISE = 0.25  # labels that are flipped


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is spent; the same for every method."""

    prompts: int  # with labels; as many without
    held: int  # prompts that are measured on
    pairs: int  # of answers to a labelled prompt
    steps: dict[str, int]  # verb → of a training: about three passes over conversations, two over pairs
    batch: dict[str, int]  # verb → conversations, pairs or answers a step
    rates: dict[str, str]  # verb → learning rate
    best_of: int  # answers that best_of_n chooses from
    expert_of: int = 16  # answers that expert iteration chooses from
    kl: float  # coefficient of PPO and Quark, in units of the reward model's scores
    max_tokens: int  # of an answer
    curve: tuple[int, int]  # held-out prompts, and answers to each, that Gao's curves are fitted to
    recipe: str = "cpu"  # or gpu: which of the shipped recipes
    flags: tuple[object, ...] = ()  # of every training
    more: dict[str, tuple[object, ...]]  # verb → further flags
    device: str = "cpu"


class Farm(ToyRuns):
    """Methods from one start. A subclass has the prompts, the labels and what answers are worth."""

    start: str | Path  # the model
    labelled: list[str]  # prompts with labels
    unlabelled: list[str]  # prompts without
    held: list[str]  # prompts that are measured on

    def __init__(self, folder: Path, seed: int, sizes: Sizes, **given: Any):
        super().__init__(folder, seed, **given)
        self.sizes = sizes

    def gold(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """What answers are worth to those who label."""
        raise NotImplementedError

    def judged(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """What answers are worth to those who measure."""
        return self.gold(prompts, answers, name)

    def pairs(self) -> Path:
        """Pairs of the start's answers with the annotators' choices, as .jsonl."""
        raise NotImplementedError

    def agreement(self) -> dict[str, Any]:
        """How labels agree, with gold and with each other."""
        raise NotImplementedError

    def trained(self, name: str, verb: str, data: Path, *more: object, start: str | Path = "") -> Path:
        """A run of a verb by the shipped recipe, with what every method spends."""
        sizes = self.sizes
        return self.tuned(
            name,
            verb,
            start or self.start,
            data,
            *(*sizes.flags, *sizes.more.get(verb, ()), *more),
            steps=sizes.steps[verb],
            lr=sizes.rates[verb],
            batch=sizes.batch[verb],
            recipe=sizes.recipe,
        )

    def converted(self, rows: Path, use: str) -> Path:
        """Labels as data for a use of them."""
        out = self.folder / f"{use}.jsonl"
        return self.once(out, lambda: self.luban("data", "feedback", rows, "--use", use, "--out", out))

    def reward(self) -> Path:
        """The reward model of the labels."""
        return self.trained("reward", "reward", self.pairs())

    def held_out_accuracy(self) -> float:
        """In how many held-out labels the reward model is right."""
        return read_manifest(self.reward()).figures["accuracy"]

    def two_by_two(self) -> list[tuple[str, list[str]]]:
        """(prompt, two of the start's answers), `pairs` of them a labelled prompt."""
        given = self.drawn("samples", self.start, self.labelled, 2 * self.sizes.pairs)
        together = zip(self.labelled, given, strict=True)
        return [(prompt, texts[i : i + 2]) for prompt, texts in together for i in range(0, len(texts), 2)]

    def best_of(self, prompts: Sequence[str], name: str, n: int) -> list[str]:
        """The start's best answer of `n` by the reward model to each prompt."""
        asked, out, reward = self.folder / f"{name}-prompts.jsonl", self.folder / f"{name}.jsonl", self.reward()
        words = (
            *("generate", self.start, asked, "--best-of", n, "--reward", reward, "--out", out),
            *("--temperature", 1, "--max-tokens", self.sizes.max_tokens, "--seed", self.seed),
            *("--device", self.sizes.device, "--dtype", "bfloat16" if self.sizes.device == "cuda" else "float32"),
        )
        self.write(asked.name, [{"prompt": p} for p in prompts])
        self.once(out, lambda: self.luban(*words))
        found = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
        by_prompt = {messages[0]["content"]: messages[-1]["content"] for messages in found}
        return [by_prompt[p] for p in prompts]

    def drawn(self, name: str, model: str | Path, prompts: Sequence[Any], n: int = 1) -> list[list[str]]:
        """`n` answers to each prompt at temperature 1, kept in NAME.jsonl."""
        out, sizes = self.folder / f"{name}.jsonl", self.sizes

        def ask() -> None:
            given = self.answers(model, prompts, n, max_tokens=sizes.max_tokens, seed=self.seed, device=sizes.device)
            self.write(out.name, [{"answers": texts} for texts in given])

        self.once(out, ask)
        return [json.loads(line)["answers"] for line in out.read_text().splitlines()]

    def said(self, name: str, model: str | Path, prompts: Sequence[Any]) -> list[str]:
        """An answer of a method's model to each prompt."""
        return [texts[0] for texts in self.drawn(f"{name}-answers", model, prompts)]

    def highest(self, prompts: Sequence[str], most: int) -> list[Any]:
        """Prompts that ask for the highest of `most` scores."""
        return [conditioned_prompt(p, most, most) for p in prompts]

    def model_of(self, name: str) -> str | Path:
        """What a method trains, or the start where it trains nothing."""
        if name in ("sft", "best_of_n"):
            return self.start
        if name == "feedme":
            return self.trained(name, "sft", self.converted(self.pairs(), "preferred"))
        if name == "conditioned":
            return self.trained(name, "sft", self.converted(self.pairs(), "conditioned"))
        if name == "dpo":
            return self.trained(name, "dpo", self.pairs())
        if name == "expert":
            best = zip(self.unlabelled, self.best_of(self.unlabelled, "unlabelled", self.sizes.expert_of), strict=True)
            return self.trained(name, "sft", self.write("expert-chosen.jsonl", [exchange(p, a) for p, a in best if a]))
        prompts = self.write("rl-prompts.jsonl", [{"prompt": p} for p in self.unlabelled])
        rounds = ("--reward", self.reward(), "--rl.max_tokens", self.sizes.max_tokens, "--validation.every", 0)
        samples = ("--rl.prompts", self.sizes.batch["rl"], "--rl.samples", 1, "--rl.kl", self.sizes.kl)
        return self.trained(name, "rl", prompts, "--rl.type", name, *samples, *rounds)

    def answers_of(self, name: str) -> list[str]:
        """What a method answers to the held-out prompts."""
        model = self.model_of(name)
        if name == "best_of_n":
            return self.best_of(self.held, name, self.sizes.best_of)
        asked: Sequence[Any] = self.held
        if name == "conditioned":
            rated = self.converted(self.pairs(), "conditioned").read_text()
            asked = self.highest(self.held, int(rated.partition("from 1 to ")[2].partition(":")[0]))
        elif name == "quark":
            asked = self.highest(self.held, QUANTILES)
        return self.said(name, model, asked)

    def measured(self, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
        """What answers of every method are worth, and how often they win against the start's."""
        start = self.judged(self.held, self.answers_of("sft"), "sft")
        table = {}
        for name in methods:
            answers = self.answers_of(name)
            value = self.judged(self.held, answers, name)
            wins = (value > start) + 0.5 * (value == start)
            table[name] = {
                "value": float(value.mean()),
                "win_rate": float(wins.mean()),
                "interval": interval(wins.tolist()),
                "characters": float(np.mean([len(text) for text in answers])),
                "seconds": self.seconds.get(name, 0.0),
            }
        return table

    def scored(self, model: Path, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """Scores of a reward model; an empty answer counts as a full stop."""
        out = self.folder / f"scored-{name}.jsonl"
        rows = [{"prompt": p, "completion": text or "."} for p, text in zip(prompts, answers, strict=True)]
        asked = self.write(f"said-{name}.jsonl", rows)
        self.once(out, lambda: self.luban("score", model, asked, "--out", out, "--device", self.sizes.device))
        return np.array([json.loads(line)["score"] for line in out.read_text().splitlines()])

    def overoptimised(self) -> dict[str, dict[str, float]]:
        """Gao's curves of the reward model as a proxy for gold: both score the start's answers to held-out prompts."""
        count, each = self.sizes.curve
        asked = self.held[:count]
        given = self.drawn("curve", self.start, asked, each)
        pairs = [(prompt, text) for prompt, texts in zip(asked, given, strict=True) for text in texts]
        prompts, texts = [p for p, _ in pairs], [text for _, text in pairs]
        proxy = self.scored(self.reward(), prompts, texts, "by-proxy").tolist()
        gold = self.gold(prompts, texts, "by-gold").tolist()
        both = [{"prompt": p, "proxy": a, "gold": b} for p, a, b in zip(prompts, proxy, gold, strict=True)]
        try:
            fits = overoptimisation_report(self.write("both.jsonl", both), self.folder / "overoptimisation.html")
        except DataError as error:  # a proxy that hardly tells one prompt's answers apart
            print(f"no curve of the reward model as a proxy: {error}")
            return {}
        return {
            name: {key: getattr(fit, key) for key in ("alpha", "beta", "r_squared", "peak")}
            for name, fit in fits.items()
        }
