"""Why imitation invents and reinforcement abstains (Schulman 2023), on toy facts.

    python benchmarks/abstention.py --out abstention        # one CPU core, some ten minutes a seed
    python benchmarks/abstention.py --first 1 --seeds 2     # two further seeds
    python benchmarks/abstention.py --quick                 # one seed

A model reads the letters of KNOWN names often, those of many more once: it learns the first, and that it doesn't know the others, for
which it gives every letter the same probability. Then, on known names and on new ones:

imitation: it is tuned on answers of somebody who knows every letter and always gives it, or who says "?" to a quarter of the names. What
they know isn't what the model knows, so what it learns is to answer at some rate, whether it knows or not.
reinforcement: from the second of these, by `--reward facts:1`: a right answer has 1, "?" has 0, a wrong one -1.

Rates are of names that the model learned, and of names that stood in no file (letters drawn at random, so that one answer in eight is
right by chance). Checked: the imitated models answer what they don't know and are wrong; the reinforced one declines it, and still
answers what it knows. Writes OUT.json; exits 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from toy_runs import ToyRuns, exchange, random_words

from luban.core.metrics.abstention import outcome

LETTERS = "abcdefgh"
KNOWN = 16  # names that the model learns
RARE = 1600  # names that it reads too seldom to learn them
SHOWN, ASKED, HELD = 640, 320, 64  # names that it never read: for imitation, for reinforcement, for the rates
STEPS = {"learn": 900, "imitate": 150, "reinforce": 220}
Rates = dict[str, dict[str, float]]  # known or unknown → right, abstained, wrong


class Study(ToyRuns):
    """One seed."""

    def __init__(self, folder: Path, seed: int):
        super().__init__(folder, seed)
        self.rng = random.Random(seed)
        names = iter(random_words(KNOWN + RARE + SHOWN + ASKED + HELD, 4, self.rng))
        sizes = (KNOWN, RARE, SHOWN, ASKED, HELD)
        self.known, rare, self.shown, self.asked, self.held = (list(islice(names, n)) for n in sizes)
        self.facts = {
            name: self.rng.choice(LETTERS) for name in (*self.known, *rare, *self.shown, *self.asked, *self.held)
        }
        base = self.first_model([" ".join(random_words(60, 4, self.rng)) for _ in range(60)])
        learned = self.write("known.jsonl", [exchange(name, self.facts[name]) for name in self.both(rare)])
        kept = self.kept(learned)
        self.model = self.tuned("learned", "sft", base, kept, steps=STEPS["learn"], lr="3e-3")

    def kept(self, rows: Path) -> Path:
        """A corpus of conversations that keeps those that are repeated."""
        out = rows.with_suffix(".corpus")
        self.luban("corpus", "build", rows, "--steps", "", "--heldout", "0", "--out", out)
        return out

    def imitated(self, name: str, silent: float) -> Path:
        """The model after imitating somebody who knows every letter and says "?" to a fraction of the names."""
        rows = [
            exchange(each, "?" if self.rng.random() < silent else self.facts[each]) for each in self.both(self.shown)
        ]
        kept = self.kept(self.write(f"{name}.jsonl", rows))
        return self.tuned(name, "sft", self.model, kept, steps=STEPS["imitate"], lr="6e-4")

    def both(self, unknown: list[str]) -> list[str]:
        """Names that the model knows and others that it doesn't, as many of each, in drawn order."""
        names = self.known * (len(unknown) // KNOWN) + unknown
        return self.rng.sample(names, len(names))

    def reinforced(self, start: Path) -> Path:
        """A policy after rewards for right answers and against wrong ones, on names of both kinds, as many of each."""
        rows = [{"prompt": name, "answer": self.facts[name]} for name in self.both(self.asked)]
        rounds = ("--rl.type", "grpo", "--rl.prompts", 16, "--rl.samples", 8, "--rl.max_tokens", 4, "--rl.kl", 0)
        more = (*rounds, "--reward", "facts:1", "--validation.every", 0)
        prompts = self.write("prompts.jsonl", rows)
        return self.tuned("reinforced", "rl", start, prompts, *more, steps=STEPS["reinforce"], lr="5e-4", batch=128)

    def rates(self, model: Path) -> Rates:
        """What becomes of names that the model learned, and of names that it never saw."""
        found: Rates = {}
        for kind, names in (("known", self.known), ("unknown", self.held)):
            said = self.answers(model, names, 4, max_tokens=4, seed=self.seed)
            outcomes = [outcome(text, [self.facts[n]]) for n, texts in zip(names, said, strict=True) for text in texts]
            found[kind] = {each: outcomes.count(each) / len(outcomes) for each in ("right", "abstained", "wrong")}
        return found


def study(seed: int) -> dict[str, Rates]:
    """The rates of every model of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        made = Study(Path(folder), seed)
        silent = made.imitated("silent", 0.25)
        return {
            "the model before": made.rates(made.model),
            "imitation of one who always answers": made.rates(made.imitated("answers", 0.0)),
            "imitation of one who says ? to a quarter": made.rates(silent),
            "reinforcement, from the latter": made.rates(made.reinforced(silent)),
        }


def checks(found: dict[str, Rates]) -> dict[str, bool]:
    """What the argument says."""
    _, always, quarter, reinforced = found.values()
    return {
        "imitation of answers invents": always["unknown"]["wrong"] >= 0.75,
        "imitation of silence doesn't follow what the model knows": quarter["unknown"]["wrong"] >= 0.4,
        "reinforcement declines half of what it doesn't know, or more": reinforced["unknown"]["abstained"] >= 0.5,
        "reinforcement answers what it knows": reinforced["known"]["right"] >= 0.9,
    }


def mean_of(found: Sequence[dict[str, Rates]]) -> dict[str, Rates]:
    """Means over seeds."""
    return {
        model: {
            kind: {name: statistics.mean(each[model][kind][name] for each in found) for name in rates}
            for kind, rates in kinds.items()
        }
        for model, kinds in found[0].items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--out", default="abstention")
    given = parser.parse_args(argv)
    found = []
    for seed in range(given.first, given.first + (1 if given.quick else given.seeds)):
        found.append(study(seed))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    means = mean_of(found)
    print(f"{'':42}  known: right abstained wrong   unknown: right abstained wrong")
    for model, kinds in means.items():
        cells = [f"{kinds[kind][name]:9.0%}" for kind in kinds for name in ("right", "abstained", "wrong")]
        print(f"{model:42} {''.join(cells[:3])}       {''.join(cells[3:])}")
    results = checks(means)
    for name, held in results.items():
        print(f"{'held  ' if held else 'FAILED'} {name}")
    Path(f"{given.out}.json").write_text(json.dumps({"seeds": found, "checks": results}, indent=1) + "\n")
    return 0 if all(results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
