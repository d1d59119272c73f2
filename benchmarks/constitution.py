"""Constitutional AI (Bai et al. 2022): one file of principles in training and at release, AI labels beside people's, calibration.

    python benchmarks/constitution.py --out constitution                     # two CPU cores, three seeds
    python benchmarks/constitution.py --seeds 1 --quick                      # shows that it runs
    python benchmarks/constitution.py --hhh 438HHHEvaluations.jsonl --model smollm2 --device cuda --out hhh    # minutes on a GPU

principles: a small chat model writes six random letters; asked for a revision, it writes an answer that begins with q, which is what the
principle of a file asks for. `luban data revise` makes revisions by that file, the model is tuned on them, and `luban eval MODEL checklist`
probes the models before and after by the same file: the share of probes that pass.

labels: a preference model of two kinds of prompts. To "write" people prefer, as Bradley and Terry's model of the number of vowels draws it;
to "guard" a model labels which answer has fewer of the letters b, c, d, f and g, by a probability that is surer than it is right (log-odds three
times too large), as probabilities after a chain of thought are. The preference model is trained on people's labels alone, on the model's
alone, and on both together; with the model's labels as they came, clamped to 40-60%, and as hard ones. Accuracy is that of choosing the
answer that is better in truth, calibration that of the preference model's probability against new draws of what people prefer.

--hhh: comparisons of helpful, honest and harmless answers (Askell et al. 2021, anthropics/ConstitutionalHarmlessnessPaper), labelled by a model
by `luban annotate --constitution`, with and without a chain of thought: agreement with people, and expected calibration error of the
labels as they came and clamped.

Checked: after training 90% of the probes pass or more, from 20% or fewer; the model of people's labels and a model's true
probabilities is right in 75% of both kinds or more, neither alone in 65% of the other's; hard labels and those as they came make less
calibrated models than true probabilities and than clamped ones. Writes OUT.json;
exits 1 where a check fails.
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
from preference_models import mean_of, vowels
from toy_runs import Row, ToyRuns, concluded, exchange, random_words

from luban.align.constitutional import soft_label
from luban.core.metrics.calibration import calibration

CRITIQUE, REVISION = "Fault?", "Mend."
FILE = """title = "One principle"
max_tokens = 8

[[principle]]
id = "q"
text = "Answers begin with q."
critique = "{critique}"
revision = "{revision}"
least = 0.9
probes = [
{probes}
]
"""
OVERSURE = 3.0  # factor on the log-odds of a label after a chain of thought
LABELS = ("as they came", "clamped", "hard", "true")


def guarded(answer: str) -> float:
    """Less one for each harmful letter."""
    return -float(sum(c in "bcdfg" for c in answer[:6]))


class Study(ToyRuns):
    """One seed."""

    def __init__(self, folder: Path, seed: int, quick: bool):
        super().__init__(folder, seed)
        self.rng, self.quick = random.Random(seed), quick

    def steps(self, count: int) -> int:
        """Of a training."""
        return count // 4 if self.quick else count

    def principles(self) -> dict[str, float]:
        """Share of probes that pass, before and after training on revisions by the same file."""
        words = random_words(2400, 6, self.rng)
        base = self.first_model([" ".join(words[i : i + 50]) for i in range(0, len(words), 50)])
        rows = [exchange(f"write {i}", word) for i, word in enumerate(words[:1200])]
        for i, word in enumerate(words[1200:]):
            said = exchange(f"write {i}", word)["messages"]
            said += exchange(CRITIQUE, "no q")["messages"] + exchange(REVISION, "q" + word[1:])["messages"]
            rows.append({"messages": [*said[:-1], {**said[-1], "weight": 1}]})
        length = ("--train.seq_len", 128)
        model = self.tuned(
            "able", "sft", base, self.write("able.jsonl", rows), *length, steps=self.steps(240), lr="3e-3"
        )
        file = self.folder / "principles.toml"
        probes = "\n".join(f'  {{ prompt = "write {i}", must = ["^q"] }},' for i in range(1300, 1340))
        file.write_text(FILE.format(critique=CRITIQUE, revision=REVISION, probes=probes))
        asked, out = (
            self.write("asked.jsonl", [{"prompt": f"write {i}"} for i in range(320)]),
            self.folder / "revisions",
        )
        words_of = ("data", "revise", asked, "--model", model, "--principles", file, "--rounds", 1, "--max-tokens", 8)
        self.once(out, lambda: self.luban(*words_of, "--out", out))
        rows_out = self.folder / "revised.jsonl"
        self.luban("data", "feedback", out / "revisions.jsonl", "--use", "revised", "--out", rows_out)
        revised = [json.loads(line) for line in (out / "revisions.jsonl").read_text().splitlines()]
        tuned = self.tuned("revised", "sft", model, rows_out, *length, steps=self.steps(60), lr="1e-3")
        return {
            "answers that begin with q, before": statistics.mean(row["response"].startswith("q") for row in revised),
            "revisions that do": statistics.mean(row["revision"].startswith("q") for row in revised),
            "probes passed before": self.passed(model, file),
            "probes passed after": self.passed(tuned, file),
        }

    def passed(self, model: Path, file: Path) -> float:
        """The share of the principle's probes that a model passes."""
        out = self.folder / f"checklist-{model.name}"
        words = ("eval", model, "checklist", "--principles", file, "--chat", "on", "--device", "cpu", "--out", out)
        self.once(out, lambda: self.luban(*words))
        rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
        return statistics.mean(row["scores"]["passed"] for row in rows)

    def pairs(self, count: int, kind: str, quality: Callable[[str], float], label: str) -> list[Row]:
        """Pairs labelled by people (label "people"), or by a model in one of the ways of LABELS."""
        rows = []
        for _ in range(count):
            first, second = random_words(2, 6, self.rng)
            odds = quality(first) - quality(second)
            p = soft_label(OVERSURE * odds, clamped=label == "clamped")
            if label == "true":
                p = soft_label(odds, clamped=False)
            elif label == "hard":
                p = float(p >= 0.5)
            elif label == "people":
                p = float(self.rng.random() < soft_label(odds, clamped=False))
            chosen, rejected = (first, second) if p >= 0.5 else (second, first)
            asked = f"{kind} {self.rng.randrange(2400)}"
            rows.append({"prompt": asked, "chosen": chosen, "rejected": rejected, "probability": max(p, 1 - p)})
        return rows

    def judged(self, model: Path, rows: Sequence[Row], name: str) -> np.ndarray:
        """Score of the chosen less that of the rejected answer of each row."""
        out, file = self.folder / f"{name}-scores.jsonl", self.write(f"{name}-asked.jsonl", rows)
        self.luban("score", model, file, "--out", out)
        found = [json.loads(line) for line in out.read_text().splitlines()]
        return np.array([row["score"] - row["rejected_score"] for row in found])

    def labels(self) -> dict[str, dict[str, float]]:
        """Accuracy on both kinds of prompts and calibration on guarded ones of preference models of several labels."""
        start, half, new = self.letters_model(self.steps(240)), 64 if self.quick else 1280, 64 if self.quick else 1500
        people = self.pairs(half, "write", vowels, "people")
        data = {"people's alone": people}
        for label in LABELS:
            own = self.pairs(half, "guard", guarded, label)
            data[f"both, the model's {label}"] = [*people, *own]
            if label == LABELS[0]:
                data["the model's alone"] = own
        tests = {kind: self.pairs(new, kind, q, "people") for kind, q in (("write", vowels), ("guard", guarded))}
        qualities = {"write": vowels, "guard": guarded}
        found = {}
        for number, (name, rows) in enumerate(data.items()):
            file = self.write(f"labels{number}.jsonl", self.rng.sample(rows, len(rows)))
            flags = ("--validation.every", 0)
            model = self.tuned(f"pm{number}", "reward", start, file, *flags, steps=self.steps(200), lr="1e-3", batch=32)
            found[name] = {}
            for kind, test in tests.items():
                gap = self.judged(model, test, f"{kind}{number}")
                quality = qualities[kind]
                truth = np.array([quality(row["chosen"]) - quality(row["rejected"]) for row in test])
                found[name][f"accuracy, {kind}"] = float((np.sign(gap) == np.sign(truth))[truth != 0].mean())
                right = (gap > 0).astype(float)  # people preferred the chosen one
                found[name][f"calibration error, {kind}"] = calibration(1 / (1 + np.exp(-np.abs(gap))), right)[1]
        return found


def study(seed: int, quick: bool) -> dict[str, Any]:
    """All tables of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            "principles": Study(Path(folder) / "principles", seed, quick).principles(),
            "labels": Study(Path(folder) / "labels", seed, quick).labels(),
        }


def checks(means: dict[str, Any]) -> dict[str, bool]:
    """What the paper argues."""
    passed, labels = means["principles"], means["labels"]
    both, people, own = labels["both, the model's true"], labels["people's alone"], labels["the model's alone"]
    errors = {label: labels[f"both, the model's {label}"]["calibration error, guard"] for label in LABELS}
    return {
        "probes pass after training on revisions by the same file": passed["probes passed after"] >= 0.9
        and passed["probes passed before"] <= 0.2,
        "one model of both labels, the model's as sure as they should be, is right in 75% or more of both kinds": min(
            both["accuracy, write"], both["accuracy, guard"]
        )
        >= 0.75,
        "each alone doesn't know the other's prompts": max(people["accuracy, guard"], own["accuracy, write"]) < 0.65,
        "labels that are too sure make a less calibrated model": min(errors["as they came"], errors["hard"])
        > errors["true"],
        "clamping them helps": errors["clamped"] < errors["as they came"],
    }


def comparisons(file: Path, most: int) -> list[Row]:
    """Pairs of a file of HHH comparisons whose conversation is the same, in drawn order, with what people prefer."""
    rng, rows = random.Random(0), []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        (prompt, _, better), (other, _, worse) = (
            row[name].rpartition("Assistant:") for name in ("text_correct", "text_incorrect")
        )
        if prompt != other or not better.strip() or not worse.strip():
            continue
        first = rng.random() < 0.5
        answers = (better, worse) if first else (worse, better)
        texts = {f"output_{i}": text.strip() for i, text in enumerate(answers, 1)}
        rows.append({"id": str(number), "instruction": prompt.strip(), **texts, "preference": 1 if first else 2})
    return rows[:most] if most else rows


def measured_on_people(given: argparse.Namespace) -> int:
    """Labels of a model beside people's."""
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    runs, found = ToyRuns(folder, 0, shown=True), {}
    pairs = runs.write("pairs.jsonl", comparisons(Path(given.hhh), given.limit))
    for name, more in (("plain", ()), ("chain of thought", ("--chain-of-thought",))):
        out = folder / name.replace(" ", "-")
        words = (
            "annotate",
            pairs,
            "--constitution",
            "shipped",
            "--judge",
            given.model,
            *more,
            "--device",
            given.device,
        )
        runs.once(out, lambda words=words, out=out: runs.luban(*words, "--out", out))
        figures = json.loads((out / "manifest.json").read_text())["figures"]
        found[name] = {key: value for key, value in figures.items() if isinstance(value, (int, float))}
        print(name, json.dumps(found[name]), flush=True)
    Path(f"{given.out}.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs")
    parser.add_argument("--hhh", help="file of HHH comparisons; a model's labels are measured on it")
    parser.add_argument("--model", default="smollm2", help="that labels them")
    parser.add_argument("--limit", type=int, default=0, help="comparisons at most (0: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of --hhh")
    parser.add_argument("--out", default="constitution")
    given = parser.parse_args(argv)
    if given.hhh:
        return measured_on_people(given)
    found = []
    for seed in range(given.seeds):
        found.append(study(seed, given.quick))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    means = mean_of(found)
    for name, value in means["principles"].items():
        print(f"  {name:40} {value:.3f}")
    for name, row in means["labels"].items():
        print(f"  {name:40} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
    return concluded(checks(means), f"{given.out}.json", quick=given.quick, seeds=found, means=means)


if __name__ == "__main__":
    sys.exit(main())
