"""Human feedback on one planted preference: its forms and uses compared, and labels of fresh answers beside stale ones.

    python benchmarks/feedback.py --out feedback                  # one CPU core, three seeds: about a quarter of an hour
    python benchmarks/feedback.py --tables conditioned            # one of the tables: forms, uses, conditioned, iterated
    python benchmarks/feedback.py --seeds 1 --quick --out quick   # shows that it runs

A small model writes six random letters to every prompt. A simulated annotator prefers answers with more vowels; whom they
prefer of two answers is drawn from a logistic distribution of the difference in vowels (Bradley and Terry). Every row of the
tables goes through the commands that docs/ALIGNMENT.md names, on the same prompts; an answer's quality is its true share of
vowels, of random letters 5/26 = 0.19, at most 1.

forms: scores, rankings, one pair a prompt, a thumb up or down an answer, a critique with a revision. Each trains a model in the way
that it allows.
uses: imitation (of the preferred, of revisions), joint modelling, re-ranking, preference loss, reinforcement.
conditioned: all answers imitated behind a sentence that says their score, which is then asked for. Twice: from the first model, to which
prompts never said anything about its answers, and from one that was taught to write as many letters as a sentence asks for.
iterated: four rounds of DPO, whose pairs are of the newest model's answers (fresh) or of the first model's (stale), equally many.

Checked: reinforcement and the preference loss are above imitation, every use above the model it starts from, what a model that reads its
prompts writes for the highest score above what it writes unasked and for the lowest, fresh above stale. Trainings are kept in OUT, each seed apart: the same command goes on where the last one stopped. Writes OUT.json; exits 1 where a
check fails.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from toy_runs import Row, ToyRuns

from luban.align.feedback import conditioned_prompt

LENGTH = 6  # letters of an answer
SHARPNESS = 1.5  # of the annotator: log-odds for one vowel more
HELD = 64  # prompts that quality is measured on
READING, CONDITIONING = 10, 12  # times `steps`, of the model that learns to read its prompts and of conditioned ones
LONGEST = 4  # times the shortest training is as long as the longest
RATES = {"dpo": "2e-4", "rl": "5e-4"}  # of learning; more, and answers become all the same


def quality(answer: str) -> float:
    """The share of vowels among six letters; what comes behind them counts for nothing."""
    return sum(c in "aeiou" for c in answer[:LENGTH]) / LENGTH


class Annotator:
    """A person whose preferences are noisy.

    Args:
        rng: of their noise.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def scores(self, answers: Sequence[str]) -> list[float]:
        """Utilities with Gumbel noise: comparing two of them is Bradley and Terry's model, ordering several Plackett and
        Luce's."""
        return [SHARPNESS * LENGTH * quality(each) + float(self.rng.gumbel()) for each in answers]

    def revise(self, answer: str) -> tuple[str, str]:
        """(critique, revision with one more vowel)."""
        wrong = [i for i, c in enumerate(answer) if c not in "aeiou"]
        if not wrong:
            return "good", answer
        at = int(self.rng.choice(wrong))
        vowel = str(self.rng.choice([*"aeiou"]))
        return f"letter {at + 1} is no vowel", answer[:at] + vowel + answer[at + 1 :]


class Study(ToyRuns):
    """One seed: a first model, annotated answers of it, and what is made of them.

    Args:
        folder: of its files.
        prompts: that are annotated, four answers each.
        steps: of a training at least.
    """

    def __init__(self, folder: Path, seed: int, prompts: int, steps: int):
        super().__init__(folder, seed, shown=True)
        self.steps = steps
        self.rng = np.random.default_rng(seed)
        self.annotator = Annotator(self.rng)
        self.prompts = [f"write {i}" for i in range(prompts)]
        self.base = (
            self.letters_model()
        )  # with fewer steps it writes bytes that are no text, which nothing can be tuned on
        self.feedback = self.annotated(self.base)

    def tuned_by(self, name: str, verb: str, start: Path, data: Path, *more: object, lr: str = "") -> Path:
        """A run of a verb that trains: two passes over conversations, pairs or rankings, within `LONGEST` times `steps`; `luban rl` for
        `steps`."""
        rate, batch = lr or RATES.get(verb, "1e-3"), 64 if verb == "rl" else 16
        passes = 2 * len(data.read_text().splitlines()) // batch
        steps = self.steps if verb == "rl" else min(max(self.steps, passes), LONGEST * self.steps)
        return self.tuned(name, verb, start, data, *more, steps=steps, lr=rate, batch=batch)

    def drawn(self, model: Path, prompts: Sequence[Any], n: int) -> list[list[str]]:
        """`n` answers a prompt, other ones at every call."""
        return self.answers(model, prompts, n, seed=int(self.rng.integers(2**31)))

    def annotated(self, model: Path) -> list[Row]:
        """Every prompt with four answers of a model and the annotator's scores."""
        given = zip(self.prompts, self.drawn(model, self.prompts, 4), strict=True)
        return [{"prompt": p, "responses": texts, "scores": self.annotator.scores(texts)} for p, texts in given]

    def measured(self, model: Path, wanted: int = 0) -> float:
        """Mean quality of eight answers each to prompts that nothing was trained on; `wanted`: of 5, for conditioned models."""
        prompts: list[Any] = [f"write {2_000 + i}" for i in range(HELD)]
        if wanted:
            prompts = [conditioned_prompt(p, wanted, 5) for p in prompts]
        return float(np.mean([quality(text) for texts in self.drawn(model, prompts, 8) for text in texts]))

    def converted(self, rows: Path, use: str) -> Path:
        """Feedback as data for a use of it."""
        out = rows.with_name(f"{rows.stem}-{use}.jsonl")
        return self.once(out, lambda: self.luban("data", "feedback", rows, "--use", use, "--out", out))

    def forms(self) -> dict[str, float]:
        """Quality after as many passes over each form."""
        scored = self.write("scored.jsonl", self.feedback)
        two = [{**row, "responses": row["responses"][:2], "scores": row["scores"][:2]} for row in self.feedback]
        one = self.write("two.jsonl", two)
        thumbs = [{**row, "scores": [float(s > 3.0) for s in row["scores"]]} for row in self.feedback]
        rated = self.write("thumbs.jsonl", thumbs)
        dpo = ("--objective.sft", "0")
        runs = {
            "scores, as all pairs": self.tuned_by("f-scores", "dpo", self.base, self.converted(scored, "pairs"), *dpo),
            "one pair a prompt": self.tuned_by("f-pair", "dpo", self.base, self.converted(one, "pairs"), *dpo),
            "thumbs (KTO)": self.tuned_by(
                "f-thumbs", "dpo", self.base, self.converted(rated, "unpaired"), "--objective.method.type", "kto"
            ),
            "critiques, revisions imitated": self.tuned_by("f-revised", "sft", self.base, self.revised()),
        }
        return {name: self.measured(run) for name, run in runs.items()}

    def revised(self) -> Path:
        """Conversations with the revision of every prompt's first answer."""
        rows = []
        for row in self.feedback:
            critique, revision = self.annotator.revise(row["responses"][0])
            rows.append(
                {"prompt": row["prompt"], "response": row["responses"][0], "critique": critique, "revision": revision}
            )
        return self.converted(self.write("critiques.jsonl", rows), "revised")

    def uses(self) -> dict[str, float]:
        """Quality after each use of the scored answers."""
        scored = self.write("scored.jsonl", self.feedback)
        pairs = self.converted(scored, "pairs")
        ranked = self.converted(scored, "rankings")
        found = {"none: the model it starts from": self.measured(self.base)}
        found["imitation of the preferred"] = self.measured(
            self.tuned_by("u-imitation", "sft", self.base, self.converted(scored, "preferred"))
        )
        reward = self.tuned_by("u-reward", "reward", self.base, ranked)
        joint = self.tuned_by("u-joint", "reward", self.base, ranked, "--objective.language", "1")
        for name, writer, judge in (("", self.base, reward), (", by a joint model of its own answers", joint, joint)):
            found[f"re-ranking, best of 16{name}"] = self.best_of(writer, judge)
        found["preference loss (DPO)"] = self.measured(self.tuned_by("u-dpo", "dpo", self.base, pairs))
        prompts, best = self.write("prompts.jsonl", [{"prompt": p} for p in self.prompts]), self.folder / "best.jsonl"
        rl = ("--reward", reward, "--rl.max_tokens", "12", "--rl.kl", "0.02", "--checkpoint.every", "1000")
        rl += ("--rl.prompts", "8", "--rl.samples", "8")  # the same rounds for both
        for kind in ("grpo", "ppo"):
            run = self.tuned_by(f"u-{kind}", "rl", self.base, prompts, "--rl.type", kind, *rl)
            found[f"reinforcement ({kind.upper()}) of the reward model"] = self.measured(run)
        self.chosen(best, self.base, prompts, reward)
        found["rejection sampling, then imitation"] = self.measured(
            self.tuned_by("u-rejection", "sft", self.base, best)
        )
        return found

    def conditioned(self) -> dict[str, float]:
        """Quality by the score asked for, from a first model that never had to read its prompts and from one that had to."""
        found = {}
        reading = self.letters_model(READING * self.steps, reads=True)
        for name, start, feedback in (("reads", reading, self.annotated(reading)), ("", self.base, self.feedback)):
            words = "it reads its prompts" if name else "the first model"
            scored = self.write(f"c{name}-scored.jsonl", feedback)
            rated, best = self.converted(scored, "conditioned"), self.converted(scored, "preferred")
            model = self.tuned(f"c{name}", "sft", start, rated, steps=CONDITIONING * self.steps, lr="1e-3")
            found[f"{words}: before"] = self.measured(start)
            found[f"{words}: imitation of the preferred"] = self.measured(
                self.tuned_by(f"c{name}-imitation", "sft", start, best)
            )
            for wanted in (5, 4, 3, 2, 1):
                found[f"{words}: conditioned, asked for {wanted} of 5"] = self.measured(model, wanted)
        return found

    def best_of(self, writer: Path, judge: Path) -> float:
        """Mean true quality of the best of 16 by a reward model."""
        prompts = self.write("held.jsonl", [{"prompt": f"write {2_000 + i}"} for i in range(HELD)])
        out = self.folder / f"best-{writer.name}.jsonl"
        rows = [json.loads(line) for line in self.chosen(out, writer, prompts, judge).read_text().splitlines()]
        return float(np.mean([quality(row["messages"][-1]["content"]) for row in rows]))

    def chosen(self, out: Path, writer: Path, prompts: Path, judge: Path) -> Path:
        """The best of 16 answers to each prompt by a reward model."""
        words = ("generate", writer, prompts, "--best-of", 16, "--reward", judge, "--out", out)
        more = ("--temperature", 1, "--max-tokens", 12, "--seed", self.seed)
        return self.once(out, lambda: self.luban(*words, *more))

    def iterated(self, rounds: int = 4) -> dict[str, list[float]]:
        """Quality after every round."""
        found: dict[str, list[float]] = {}
        share = len(self.prompts) // rounds
        for kind in ("fresh", "stale"):
            model, curve = self.base, [self.measured(self.base)]
            for number in range(rounds):
                prompts = self.prompts[number * share : (number + 1) * share]
                given = self.drawn(model if kind == "fresh" else self.base, prompts, 4)
                rows = [
                    {"prompt": p, "responses": texts, "scores": self.annotator.scores(texts)}
                    for p, texts in zip(prompts, given, strict=True)
                ]
                pairs = self.converted(self.write(f"{kind}{number}.jsonl", rows), "pairs")
                model = self.tuned_by(f"{kind}{number}", "dpo", model, pairs)
                curve.append(self.measured(model))
            found[kind] = curve
        return found


TABLES = ("forms", "uses", "conditioned", "iterated")


def study(folder: Path, seed: int, quick: bool, tables: Sequence[str]) -> dict[str, Any]:
    """Tables of one seed."""
    made = Study(folder, seed, 64 if quick else 512, 10 if quick else 60)
    return {name: getattr(made, name)() for name in tables}


def table(found: Sequence[dict[str, Any]], what: str) -> dict[str, tuple[float, float]]:
    """Mean over seeds and its standard error, by row."""
    values = {name: [each[what][name] for each in found] for name in found[0][what]}
    return {
        n: (statistics.mean(v), statistics.stdev(v) / len(v) ** 0.5 if len(v) > 1 else 0.0) for n, v in values.items()
    }


def checks(found: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """What the literature says, on the mean over seeds."""
    results = {}
    if "uses" in found[0]:
        uses = {name: mean for name, (mean, _) in table(found, "uses").items()}
        start, imitation = uses.pop("none: the model it starts from"), uses["imitation of the preferred"]
        above = min(value for name, value in uses.items() if "DPO" in name or "reinforcement" in name)
        results["every use is above the first model"] = min(uses.values()) > start
        results["preference loss and reinforcement are above imitation"] = above > imitation
    if "conditioned" in found[0]:
        means = {name: mean for name, (mean, _) in table(found, "conditioned").items()}
        before, _, *asked = (value for name, value in means.items() if name.startswith("it reads"))
        results["a model that reads its prompts follows the score asked for"] = asked[0] > before > asked[-1]
    if "iterated" in found[0]:
        ends = {kind: statistics.mean(each["iterated"][kind][-1] for each in found) for kind in ("fresh", "stale")}
        results["fresh labels are above stale ones"] = ends["fresh"] > ends["stale"]
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--quick", action="store_true", help="fewer prompts and steps: shows that it runs")
    parser.add_argument("--out", default="feedback")
    given = parser.parse_args(argv)
    found, began = [], time.perf_counter()
    for seed in range(given.first, given.first + given.seeds):
        found.append(study(Path(given.out) / f"seed-{seed}", seed, given.quick, given.tables))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    for what in [name for name in given.tables if name != "iterated"]:
        print(f"\n{what}: mean quality, standard error over {given.seeds} seeds")
        for name, (mean, error) in table(found, what).items():
            print(f"  {name:55} {mean:.3f} ± {error:.3f}")
    if "iterated" in given.tables:
        print("\niterated: quality after each round")
        for kind in ("fresh", "stale"):
            rounds = zip(*(each["iterated"][kind] for each in found), strict=True)
            print(f"  {kind:6}", *(f"{statistics.mean(values):.3f}" for values in rounds))
    results = checks(found)
    for name, held in results.items():
        print(f"{'held  ' if held else 'FAILED'} {name}")
    machine = {"torch": torch.__version__, "machine": platform.machine(), "seconds": time.perf_counter() - began}
    Path(f"{given.out}.json").write_text(json.dumps({"seeds": found, "checks": results, **machine}, indent=1) + "\n")
    return 0 if all(results.values()) or given.quick else 1


if __name__ == "__main__":
    sys.exit(main())
