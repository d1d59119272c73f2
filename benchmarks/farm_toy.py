"""The toy of benchmarks/alpaca_farm.py: answers of six letters, worth their share of vowels, known exactly."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from farm_methods import NOISE, Farm, Sizes
from toy_runs import Row

from luban.core.metrics.agreement import agreement, cohen_kappa

SHARPNESS = 3.0  # of annotators: log-odds for one vowel more
TOY = Sizes(
    prompts=640,
    held=256,
    pairs=4,
    steps={"sft": 60, "reward": 160, "dpo": 160, "rl": 160},
    batch={"sft": 32, "reward": 32, "dpo": 32, "rl": 64},
    rates={"sft": "5e-4", "reward": "1e-3", "dpo": "2e-4", "rl": "1e-3"},
    best_of=64,
    kl=0.1,
    max_tokens=12,
    curve=(64, 128),
    more={},
)


class ToyFarm(Farm):
    """Six random letters."""

    def __init__(self, folder: Path, seed: int, sizes: Sizes, **given: Any):
        super().__init__(folder, seed, sizes, **given)
        self.start = self.letters_model()
        numbers = [f"write {i}" for i in range(2 * sizes.prompts)]
        self.labelled, self.unlabelled = numbers[: sizes.prompts], numbers[sizes.prompts :]
        self.held = [f"write {2_400 + i}" for i in range(sizes.held)]

    def gold(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """Shares of vowels among six letters; what comes behind them counts for nothing."""
        return np.array([sum(c in "aeiou" for c in answer[:6]) / 6 for answer in answers])

    def choice(self, values: np.ndarray, rng: random.Random) -> int:
        """Which of two answers an annotator prefers: Bradley and Terry's model of the vowels, a quarter turned round."""
        first = rng.random() < 1 / (1 + np.exp(-6 * SHARPNESS * (values[0] - values[1])))
        return int(first == (rng.random() < NOISE))

    def _drawn_pairs(self) -> list[tuple[str, list[str], np.ndarray]]:
        """(prompt, two answers, what they are worth) of pairs whose answers differ and aren't empty."""
        kept = [(prompt, pair) for prompt, pair in self.two_by_two() if pair[0] != pair[1] and all(pair)]
        return [(prompt, pair, self.gold([], pair, "")) for prompt, pair in kept]

    def pairs(self) -> Path:
        """See `Farm.pairs`."""
        out, rng, rows = self.folder / "pairs.jsonl", random.Random(self.seed), list[Row]()
        if out.exists():
            return out
        for prompt, pair, values in self._drawn_pairs():
            best = self.choice(values, rng)
            rows.append({"prompt": prompt, "chosen": pair[best], "rejected": pair[1 - best]})
        return self.write(out.name, rows)

    def agreement(self) -> dict[str, Any]:
        """Of labels of pairs that aren't worth the same: with gold, and with those of another annotator; and how often the reward
        model agrees with gold and with labels, on the pairs that it was trained on."""
        rng = random.Random(self.seed + 1)
        differ = [each for each in self._drawn_pairs() if each[2][0] != each[2][1]]
        labels = [[self.choice(values, rng) for _ in range(4)] for _, _, values in differ]
        right = [int(values[1] > values[0]) for _, _, values in differ]
        first, second = [each[0] for each in labels], [each[1] for each in labels]
        spread = [each[0] != round(statistics.mean(each[1:])) for each in labels]  # from the majority of three others
        asked = [(prompt, text) for prompt, pair, _ in differ for text in pair]
        scores = self.scored(self.reward(), [p for p, _ in asked], [text for _, text in asked], "labelled")
        chosen = [int(b > a) for a, b in zip(scores[::2], scores[1::2], strict=True)]
        return {
            "pairs": len(differ),
            "with gold": agreement(first, right),
            "with another": agreement(first, second),
            "kappa with another": cohen_kappa(first, second),
            "variance": statistics.mean(spread),
            "reward model with held-out labels": self.held_out_accuracy(),
            "reward model with gold": agreement(chosen, right),
        }
