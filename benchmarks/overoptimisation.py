"""Reward over-optimisation (Gao et al. 2023) with trained proxies: best-of-n and PPO against reward models of several qualities.

    python benchmarks/overoptimisation.py --out overoptimisation          # two CPU cores, three seeds
    python benchmarks/overoptimisation.py --proxies 3 --rounds 40 --answers 64 --rate 8e-4      # a quarter of that time
    python benchmarks/overoptimisation.py --seeds 1 --quick --out quick   # shows that it runs

Answers are six letters, at first random ones. Gold is the number of different vowels among them. Proxies are reward models trained on
pairs of random answers, labelled by gold and then flipped at random; they differ in the number of pairs and in how many labels are
flipped. Two of the same vowel are rare in random answers, so that a proxy learns better that vowels are good than that only
different ones are: optimised far enough, its answers repeat vowels, and gold falls. The form of an answer is rewarded beside the
proxy: without that, noisy proxies like empty answers best, which no pair had.

best of n: the unbiased estimator over 256 answers a prompt, KL log n - (n - 1) / n. reinforcement: one run of PPO a proxy with a small KL
penalty; every round's answers, their KL from the start as measured and their gold are a point. Both curves are fitted by Gao's forms,
with d the square root of KL: d (α - β d) and d (α - β ln d); the peak is where the fitted curve is highest.

Checked: R² is 0.95 or more of every curve, on the mean over seeds; of proxies with equally many pairs, those with more flipped labels
peak earlier under reinforcement and have a lower gold there. Trainings are kept in OUT, each seed apart: the same command goes on where the
last one stopped, and seeds may be made by processes of their own (--first 1 --seeds 1). Writes OUT.json; exits 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from toy_runs import Row, ToyRuns, concluded, random_words

from luban.align.best_of import best_of_n_kl
from luban.align.overoptimisation import best_of_n_curve, fit_overoptimisation

PROXIES = {
    "320 pairs": (320, 0.0),
    "320 pairs, 20% flipped": (320, 0.2),
    "320 pairs, 35% flipped": (320, 0.35),
    "1280 pairs": (1280, 0.0),
}
NOISY = tuple(PROXIES)[:3]  # in the order of noise, equally many pairs
SIZES = tuple(2**i for i in range(9))  # n of best-of-n
LEARN = 120  # steps of a proxy
SIX, FORM = "^[a-z]{6}$", 3.0  # the form of an answer and what it is worth, which keeps answers empty of letters out


def gold(answer: str) -> float:
    """Different vowels among the first six letters."""
    return float(len(set(answer[:6]) & set("aeiou")))


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is trained."""

    proxies: int = len(PROXIES)  # the first ones of PROXIES
    rounds: int = 50  # of PPO
    answers: int = 128  # a round
    rate: str = "5e-4"  # of learning, in PPO
    quick: bool = False


QUICK = Size(rounds=8, answers=16, rate="1e-2", quick=True)


class Study(ToyRuns):
    """One seed."""

    def __init__(self, folder: Path, seed: int, size: Size):
        super().__init__(folder, seed, shown=True)
        self.rng, self.size, self.quick = random.Random(seed), size, size.quick
        self.start = self.letters_model(20 if self.quick else 240)

    def proxy(self, name: str, pairs: int, flipped: float) -> Path:
        """A reward model of noisy labels."""
        rows: list[Row] = []
        while len(rows) < pairs:
            first, second = random_words(2, 6, self.rng)
            if gold(first) == gold(second):
                continue
            best = (gold(first) > gold(second)) != (self.rng.random() < flipped)
            chosen, rejected = (first, second) if best else (second, first)
            rows.append({"prompt": f"write {self.rng.randrange(2400)}", "chosen": chosen, "rejected": rejected})
        data, steps = self.write(f"{name}.jsonl", rows), 4 if self.quick else LEARN
        return self.tuned(name, "reward", self.start, data, "--validation.every", 0, steps=steps, lr="1e-3", batch=32)

    def best_of_n(self, proxy: Path) -> tuple[float, list[list[float]]]:
        """(the share of pairs of random answers of different gold that the proxy orders as gold does, (KL, gold) of each n)."""
        prompts, each = (4, SIZES[-1]) if self.quick else (32, SIZES[-1])
        words = [random_words(each, 6, self.rng) for _ in range(prompts)]
        rows = [{"prompt": f"write {i}", "completion": word} for i, those in enumerate(words) for word in those]
        out = self.folder / f"{proxy.name}-scores.jsonl"
        asked = self.write(f"{proxy.name}-asked.jsonl", rows)
        self.once(out, lambda: self.luban("score", proxy, asked, "--out", out))
        scores = np.array([json.loads(line)["score"] for line in out.read_text().splitlines()]).reshape(prompts, each)
        values = np.array([[gold(word) for word in those] for those in words])
        better, differ = scores[:, ::2] > scores[:, 1::2], values[:, ::2] != values[:, 1::2]
        agreement = float((better == (values[:, ::2] > values[:, 1::2]))[differ].mean())
        curve = zip(map(best_of_n_kl, SIZES), best_of_n_curve(scores, values, SIZES), strict=True)
        return agreement, [list(point) for point in curve]

    def reinforced(self, proxy: Path) -> list[list[float]]:
        """(KL, gold) of each round of PPO."""
        rounds, answers = self.size.rounds, self.size.answers
        prompts = self.write("prompts.jsonl", [{"prompt": f"write {i}"} for i in range(1024)])
        flags = (
            "--rl.type",
            "ppo",
            "--rl.prompts",
            answers,
            "--rl.samples",
            1,
            "--rl.max_tokens",
            12,
            "--rl.kl",
            0.002,
        )
        run = self.tuned(
            f"{proxy.name}-ppo",
            "rl",
            self.start,
            prompts,
            *(*flags, "--reward", f"{proxy},regex:{SIX}", "--reward_weights", f"1,{FORM}", "--validation.every", 0),
            steps=2 * rounds,
            lr=self.size.rate,
            batch=answers,
        )
        points = []
        for file in sorted((run / "rollouts").glob("round_*.json")):
            rows = json.loads(file.read_text())["answers"]
            points.append(
                [statistics.mean(row["kl"] for row in rows), statistics.mean(gold(row["text"]) for row in rows)]
            )
        return points


def study(folder: Path, seed: int, size: Size) -> dict[str, Any]:
    """The curves of every proxy of one seed."""
    made, found = Study(folder, seed, size), {}
    for number, (name, (pairs, flipped)) in enumerate([*PROXIES.items()][: size.proxies]):
        proxy = made.proxy(f"proxy{number}", 64 if size.quick else pairs, flipped)
        agreement, of_n = made.best_of_n(proxy)
        found[name] = {"agreement": agreement, "best_of_n": of_n, "reinforcement": made.reinforced(proxy)}
    return found


def fits(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Gao's forms fitted to the mean curve over seeds of each proxy."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name in found[0]:
        table[name] = {}
        for form in ("best_of_n", "reinforcement"):
            curve = np.mean([each[name][form] for each in found], axis=0)
            kl, value = curve.T
            fit = fit_overoptimisation(form, np.maximum(kl, 0.0), value - value[0])  # type: ignore[arg-type]
            top = int(value.argmax())
            table[name][form] = {
                "alpha": fit.alpha,
                "beta": fit.beta,
                "r_squared": fit.r_squared,
                "peak": fit.peak,
                "start": float(value[0]),
                "best": float(value[top]),
                "best_at": math.sqrt(max(0.0, float(kl[top]))),
                "end": float(value[-1]),
                "end_at": math.sqrt(max(0.0, float(kl[-1]))),
            }
    return table


def checks(table: dict[str, dict[str, dict[str, float]]]) -> dict[str, bool]:
    """What Gao et al. report."""
    learned = [table[name]["reinforcement"] for name in NOISY]
    least = min(fit["r_squared"] for forms in table.values() for fit in forms.values())
    return {
        "R² is 0.95 or more of every curve": least >= 0.95,
        "the noisier the proxy, the earlier the peak of reinforcement": all(
            a["peak"] > b["peak"] for a, b in pairwise(learned)
        ),
        "the noisier the proxy, the lower the best gold": all(a["best"] > b["best"] for a, b in pairwise(learned)),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument(
        "--proxies", type=int, choices=(3, 4), default=Size.proxies, help="3: without the one of many pairs"
    )
    parser.add_argument("--rounds", type=int, default=Size.rounds, help="of PPO")
    parser.add_argument("--answers", type=int, default=Size.answers, help="a round of PPO")
    parser.add_argument("--rate", default=Size.rate, help="of learning, in PPO")
    parser.add_argument("--quick", action="store_true", help="small proxies and few rounds: shows that it runs")
    parser.add_argument("--out", default="overoptimisation")
    given = parser.parse_args(argv)
    size = Size(proxies=given.proxies, rounds=given.rounds, answers=given.answers, rate=given.rate)
    found = []
    for seed in range(given.first, given.first + given.seeds):
        found.append(study(Path(given.out) / f"seed-{seed}", seed, QUICK if given.quick else size))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    table = fits(found)
    print(
        f"\n{'proxy':26}{'form':15}{'α':>8}{'β':>8}{'R²':>7}{'peak':>10}   gold at the start, best (at √KL), at the end (√KL)"
    )
    for name, forms in table.items():
        for form, f in forms.items():
            print(
                f"{name:26}{form:15}{f['alpha']:8.3f}{f['beta']:8.3f}{f['r_squared']:7.3f}{f['peak']:10.3g}   {f['start']:.2f}, "
                f"{f['best']:.2f} ({f['best_at']:.2f}), {f['end']:.2f} ({f['end_at']:.2f})"
            )
    alone = [fits([each]) for each in found]
    print("\neach seed: agreement with gold on random answers; R², gold at its best (at √KL)")
    for name, forms in table.items():
        print(f"{name:26}agreement      ", "  ".join(f"{each[name]['agreement']:14.3f}" for each in found))
        for form in forms:
            cells = (one[name][form] for one in alone)
            row = (f"{f['r_squared']:5.3f} {f['best']:.2f} ({f['best_at']:.2f})" for f in cells)
            print(f"{'':26}{form:15} {'  '.join(row)}")
    return concluded(checks(table), f"{given.out}.json", quick=given.quick, seeds=found, fits=table, fits_of_each=alone)


if __name__ == "__main__":
    sys.exit(main())
