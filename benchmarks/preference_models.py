"""Reward models on planted preferences: Llama 2's margins by grade, and two models for two criteria with their combination rule.

    python benchmarks/preference_models.py --out preference_models          # two CPU cores, three seeds
    python benchmarks/preference_models.py --seeds 1 --quick                # shows that it runs

Answers are six random letters.

margins (Touvron et al. 2023b, tables 27 and 28): an answer's quality is its number of vowels. An annotator perceives the difference of two
answers with logistic noise, prefers by its sign and grades by its size: 3 and more significantly better, 2 better, 1 slightly, else
negligibly. Reward models are trained on 480 labels, four times, without margins, with small and with large ones; accuracy is that of
new labels of the same annotator, by grade, and the spread that of scores. (With 2,560 labels all three are as good as the noise lets them be.)

criteria (section 3.2): helpfulness is the number of vowels, harm the number of the letters a and e, so that what helps can harm. Half of
the pairs are labelled by each criterion. One model of all pairs is compared with one of each half by accuracy on new pairs; then
the best of 16 answers is chosen by the mixed model, by the helpfulness model, and by guarded:SAFETY:HELPFULNESS on prompts of which half
are tagged as unsafe: how many vowels and how many harmful letters do the chosen answers have?

Checked: margins raise the accuracy of significantly better answers by half a point or more, large ones widen the spread of scores; each
model of one criterion is above the mixed one on it; guarded answers to tagged prompts have less harm than those of the helpfulness
model, and to untagged ones more vowels than those to tagged ones. Writes OUT.json; exits 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from toy_runs import Row, ToyRuns, concluded, random_words

from luban.align.preferences import GRADES

SIGNIFICANT, BETTER, SLIGHT = 3.0, 2.0, 1.0  # least perceived differences of the grades
TABLES = ("none", "small", "large")
FEW, DRAWS, SHORT = 480, 4, 60  # labelled pairs, sets of them and steps of each training, of the comparison of margins
Quality = Callable[[str], float]


def vowels(answer: str) -> float:
    """How helpful an answer is."""
    return float(sum(c in "aeiou" for c in answer[:6]))


def harmless(answer: str) -> float:
    """How safe an answer is: less one for each harmful letter."""
    return -float(sum(c in "ae" for c in answer[:6]))


class Study(ToyRuns):
    """One seed.

    Args:
        pairs: that a model is trained on.
        tested: pairs that it is measured on.
        steps: of each training.
    """

    def __init__(self, folder: Path, seed: int, pairs: int, tested: int, steps: int):
        super().__init__(folder, seed)
        self.pairs, self.tested, self.steps = pairs, tested, steps
        self.rng = random.Random(seed)
        self.start = self.letters_model(2 * steps)

    def labelled(self, count: int, quality: Quality, prompt: str = "write") -> list[Row]:
        """Graded pairs of new answers."""
        rows: list[Row] = []
        while len(rows) < count:
            first, second = random_words(2, 6, self.rng)
            noise = self.rng.random()
            perceived = quality(first) - quality(second) + float(np.log(noise / (1 - noise)))
            size = abs(perceived)
            grade = next((g for g, least in enumerate((SIGNIFICANT, BETTER, SLIGHT)) if size >= least), 3)
            better, worse = (first, second) if perceived > 0 else (second, first)
            asked = f"{prompt} {self.rng.randrange(2400)}"
            rows.append({"prompt": asked, "chosen": better, "rejected": worse, "grade": grade})
        return rows

    def model(self, name: str, rows: Sequence[Row], *more: object, steps: int = 0) -> Path:
        """A reward model."""
        data = self.write(f"{name}.jsonl", rows)
        flags = ("--validation.every", 0, *more)
        return self.tuned(name, "reward", self.start, data, *flags, steps=steps or self.steps, lr="1e-3", batch=32)

    def differences(self, model: Path, rows: Sequence[Row], name: str) -> tuple[np.ndarray, float]:
        """(score of the chosen less that of the rejected answer of each row; standard deviation of all scores)."""
        out, file = self.folder / f"{name}-scores.jsonl", self.write(f"{name}-asked.jsonl", rows)
        self.luban("score", model, file, "--out", out)
        found = [json.loads(line) for line in out.read_text().splitlines()]
        chosen, rejected = (np.array([row[key] for row in found]) for key in ("score", "rejected_score"))
        return chosen - rejected, float(np.concatenate([chosen, rejected]).std())

    def margins(self) -> dict[str, dict[str, float]]:
        """Accuracy by grade and spread of scores of each table of margins, means over sets of labels."""
        return mean_of([self._margins(draw) for draw in range(1 if self.steps < SHORT else DRAWS)])

    def _margins(self, draw: int) -> dict[str, dict[str, float]]:
        rows, new = self.labelled(min(FEW, self.pairs), vowels), self.labelled(self.tested, vowels)
        grades = np.array([row["grade"] for row in new])
        found = {}
        for table in TABLES:
            name = f"margin-{table}-{draw}"
            model = self.model(name, rows, "--objective.margin", table, steps=min(SHORT, self.steps))
            difference, spread = self.differences(model, new, name)
            right = (difference > 0) + 0.5 * (difference == 0)
            by_grade = {GRADES[g]: float(right[grades == g].mean()) for g in range(len(GRADES))}
            found[table] = {**by_grade, "all": float(right.mean()), "spread": spread}
        return found

    def criteria(self) -> dict[str, Any]:
        """Accuracy of one model and of two, and what the best of 16 by each reward is like."""
        half = self.pairs // 2
        helpful, safe = self.labelled(half, vowels, "write"), self.labelled(half, harmless, "write")
        mixed = self.rng.sample([*helpful, *safe], 2 * half)
        models = {
            "helpfulness": self.model("helpfulness", helpful),
            "safety": self.model("safety", safe),
            "mixed": self.model("mixed", mixed),
        }
        accuracy: dict[str, dict[str, float]] = {}
        for kind, quality in (("helpfulness", vowels), ("safety", harmless)):
            new = [
                row
                for row in self.labelled(2 * self.tested, quality)
                if quality(row["chosen"]) > quality(row["rejected"])
            ]
            accuracy[kind] = {
                name: float((self.differences(model, new, f"{kind}-{name}")[0] > 0).mean())
                for name, model in models.items()
            }
        guarded = f"guarded:{models['safety']}:{models['helpfulness']}"
        rewards = {"helpfulness": models["helpfulness"], "mixed": models["mixed"], "guarded": guarded}
        return {"accuracy": accuracy, "best of 16": {name: self.best(name, reward) for name, reward in rewards.items()}}

    def best(self, name: str, reward: str | Path) -> dict[str, float]:
        """Vowels and harmful letters of the best of 16 answers, on prompts that are tagged as unsafe and on others."""
        rows = [{"prompt": f"write {i}", "unsafe": i % 2 == 1} for i in range(max(16, self.tested // 8))]
        file, out = self.write("asked.jsonl", rows), self.folder / f"best-{name}.jsonl"
        words = ("generate", self.start, file, "--best-of", 16, "--reward", reward, "--out", out)
        self.luban(*words, "--temperature", 1, "--max-tokens", 12, "--seed", self.seed)
        answers = [json.loads(line)["messages"][-1]["content"] for line in out.read_text().splitlines()]
        found = {}
        for kind, at in (("tagged", 1), ("untagged", 0)):
            found[f"vowels, {kind}"] = statistics.mean(vowels(text) for text in answers[at::2])
            found[f"harm, {kind}"] = -statistics.mean(harmless(text) for text in answers[at::2])
        return found


def study(seed: int, quick: bool) -> dict[str, Any]:
    """All tables of one seed."""
    sizes = (128, 64, 8) if quick else (2560, 4000, 160)
    with tempfile.TemporaryDirectory() as folder:
        made = Study(Path(folder), seed, *sizes)
        return {"margins": made.margins(), "criteria": made.criteria()}


def mean_of(found: Sequence[Any]) -> Any:
    """Means over seeds, leaf by leaf."""
    if isinstance(found[0], dict):
        return {name: mean_of([each[name] for each in found]) for name in found[0]}
    return statistics.mean(found)


def checks(means: dict[str, Any]) -> dict[str, bool]:
    """What Llama 2's authors report."""
    margins, criteria = means["margins"], means["criteria"]
    best, top = criteria["best of 16"], GRADES[0]
    return {
        "margins raise the accuracy of significantly better answers by half a point": max(
            margins["small"][top], margins["large"][top]
        )
        >= margins["none"][top] + 0.005,
        "large margins widen the spread of scores": margins["large"]["spread"] > margins["none"]["spread"],
        "a model of one criterion is above the mixed one on it": all(
            row[kind] > row["mixed"] for kind, row in criteria["accuracy"].items()
        ),
        "guarded answers to tagged prompts have less harm than the helpfulness model's": best["guarded"]["harm, tagged"]
        < best["helpfulness"]["harm, tagged"],
        "guarded answers to untagged prompts help more than those to tagged ones": best["guarded"]["vowels, untagged"]
        > best["guarded"]["vowels, tagged"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="fewer pairs and steps: shows that it runs")
    parser.add_argument("--out", default="preference_models")
    given = parser.parse_args(argv)
    found = []
    for seed in range(given.seeds):
        found.append(study(seed, given.quick))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    means = mean_of(found)
    columns = (*GRADES, "all", "spread")
    print(f"\n{'margin':8}" + "".join(f"{name:>24}" for name in columns))
    for table, row in means["margins"].items():
        print(f"{table:8}" + "".join(f"{row[name]:24.3f}" for name in columns))
    for name, rows in means["criteria"].items():
        print(f"\n{name}")
        for kind, row in rows.items():
            print(f"  {kind:12}" + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return concluded(checks(means), f"{given.out}.json", quick=given.quick, seeds=found, means=means)


if __name__ == "__main__":
    sys.exit(main())
