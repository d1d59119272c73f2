"""AlpacaFarm's methods beside each other from one start (Dubois et al. 2023), on simulated annotators.

    python benchmarks/alpaca_farm.py --toy --out farm                                  # CPU, a known gold reward, three seeds
    python benchmarks/alpaca_farm.py --preferences alpaca_eval_gpt4.jsonl.gz --device cuda --out farm     # SmolLM2 on one GPU
    python benchmarks/alpaca_farm.py --preferences FILE --model RUN --tiny --out farm  # the second one's path on a CPU

Every method starts from the same model and reads the same labels: pairs of that model's answers, one in four labelled the wrong way
round. What an answer is worth is told by the gold reward alone, which no method sees.

sft: the model itself. feedme: tuned on the winners. conditioned: tuned on winners and losers behind a sentence that says which, and
asked for winners. dpo. The others use a reward model of the labels: best_of_16 at decoding; expert: tuned on the best of 16 to prompts
without labels; quark and ppo: `luban rl` on those prompts.

--toy: answers of six random letters; gold is the share of vowels; annotators draw from Bradley and Terry's model, then flip. Gold and
labels are known exactly, so the orders that the paper reports are checked: PPO and best-of-16 above expert iteration, that above
sft, sft not far below feedme.
Else: gold is a reward model of 805 instructions' pairs as GPT-4 judged them (`preferred` 1 or 2, as AlpacaEval publishes them); it labels
through `luban annotate`, as a pool of annotators with 25% noise; win rates are against the start's answers to held-out instructions.

The reward model is also measured as a proxy for gold: Gao's curves (Gao et al. 2023) of the start's answers that both score.

Printed: gold value or win rate with a 95% interval, seconds of training, agreement of the labels, Spearman's correlation of the methods'
ranks with people's (AlpacaFarm's table 2, or --humans FILE.json of method: rate). Writes OUT.json; --toy exits 1 where a check fails.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from farm_methods import METHODS, Farm, Sizes
from toy_runs import Row, exchange, random_words

from luban.core.metrics.agreement import agreement, cohen_kappa

PEOPLE = {"ppo": 55.1, "best_of_16": 50.7, "expert": 45.7, "sft": 44.3, "feedme": 37.9}  # win rates by people (table 2)
NOISE = 0.25  # labels that are flipped
LETTERS = "abcdefghijklmnopqrstuvwxyz"


TOY = Sizes(
    steps={"sft": 30, "reward": 120, "dpo": 80, "rl": 60},
    batch=16,
    answers=64,
    max_tokens=12,
    longest=100,
    rates={"sft": "5e-4", "reward": "1e-3", "dpo": "2e-4", "rl": "5e-4"},
    recipe="cpu",
)
GPU = Sizes(
    steps={"sft": 40, "reward": 200, "dpo": 60, "rl": 60},
    batch=32,
    answers=128,
    max_tokens=200,
    longest=2000,
    rates={"sft": "1e-5", "reward": "1e-5", "dpo": "1e-6", "rl": "1e-6"},
    recipe="gpu",
    flags=("--train.seq_len", 768),
    device="cuda",
)


class ToyFarm(Farm):
    """Six random letters, worth their share of vowels.

    Args:
        prompts: with labels; as many without.
    """

    def __init__(self, folder: Path, seed: int, sizes: Sizes, prompts: int = 384):
        super().__init__(folder, seed, sizes)
        self.rng = random.Random(seed)
        words = random_words(2400, 6, self.rng)
        base = self.first_model([" ".join(words[i : i + 50]) for i in range(0, len(words), 50)])
        chats = self.write("chats.jsonl", [exchange(f"write {i}", word) for i, word in enumerate(words)])
        self.start = self.tuned("start", "sft", base, chats, steps=240, lr="3e-3")
        numbers = [f"write {i}" for i in range(2 * prompts)]
        self.labelled, self.unlabelled = numbers[:prompts], numbers[prompts:]
        self.held = [f"write {2_400 + i}" for i in range(256)]

    def gold(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """Shares of vowels among six letters."""
        return np.array([sum(c in "aeiou" for c in answer) / 6 for answer in answers])

    def choice(self, values: np.ndarray) -> int:
        """Which of two answers an annotator prefers: Bradley and Terry's model of the vowels, a quarter turned round."""
        first = self.rng.random() < 1 / (1 + np.exp(-3 * 6 * (values[0] - values[1])))
        return int(first == (self.rng.random() < NOISE))

    def labels(self) -> Path:
        """Two pairs a prompt."""
        given = self.answers(self.start, self.labelled, 4, max_tokens=self.sizes.max_tokens, seed=self.seed)
        rows: list[Row] = []
        for prompt, texts in zip(self.labelled, given, strict=True):
            for pair in (texts[:2], texts[2:]):
                best = self.choice(self.gold([], pair, ""))
                rows.append({"prompt": prompt, "chosen": pair[best], "rejected": pair[1 - best]})
        self.agreement = self.label_table([self.gold([], texts[:2], "") for texts in given])
        return self.write("pairs.jsonl", [row for row in rows if row["chosen"] != row["rejected"]])

    def label_table(self, pairs: Sequence[np.ndarray]) -> dict[str, float]:
        """How labels of pairs with different answers agree: with gold, and with those of another annotator."""
        differ = [values for values in pairs if values[0] != values[1]]
        labels = [[self.choice(values) for _ in range(4)] for values in differ]
        right = [int(values[1] > values[0]) for values in differ]
        first, second = [each[0] for each in labels], [each[1] for each in labels]
        spread = [each[0] != round(statistics.mean(each[1:])) for each in labels]  # from the majority of three others
        return {
            "pairs": len(differ),
            "with gold": agreement(first, right),
            "with another": agreement(first, second),
            "kappa with another": cohen_kappa(first, second),
            "variance": statistics.mean(spread),
        }


class RealFarm(Farm):
    """Instructions with a reward model as gold.

    Args:
        file: AlpacaEval's pairs as GPT-4 judged them.
        pairs: of them that the gold reward model is trained on.
        instructions: to label, as many without labels, and 200 at most to measure on.
    """

    def __init__(self, folder: Path, seed: int, sizes: Sizes, file: Path, model: str, pairs: int, instructions: int):
        super().__init__(folder, seed, sizes)
        self.start = model
        rng = random.Random(seed)
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        texts = ("instruction", "output_1", "output_2")
        rows = [row for row in rows if max(len(row[name]) for name in texts) <= sizes.longest]
        known = sorted({row["instruction"] for row in rows})
        rng.shuffle(known)
        self.held = known[: min(200, instructions)]
        rest = known[len(self.held) :][: 2 * instructions]
        self.labelled, self.unlabelled = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        judged = [self.pair(row) for row in rng.sample(rows, min(len(rows), 2 * pairs))]
        data = self.write("gold.jsonl", [row for row in judged if row][:pairs])
        self.judge = self.trained("gold", "reward", data)

    def pair(self, row: Row) -> Row | None:
        """A row of preferences; None for a tie."""
        better = {"1": "output_1", "2": "output_2"}.get(str(row["preferred"]))
        if better is None:
            return None
        worse = "output_2" if better == "output_1" else "output_1"
        return {"prompt": row["instruction"], "chosen": row[better], "rejected": row[worse]}

    def gold(self, prompts: Sequence[str], answers: Sequence[str], name: str) -> np.ndarray:
        """Scores of the gold reward model; an empty answer has the lowest."""
        rows = [{"prompt": p, "completion": a or "."} for p, a in zip(prompts, answers, strict=True)]
        out = self.folder / f"scored-{name}.jsonl"
        self.luban(
            "score", self.judge, self.write(f"said-{name}.jsonl", rows), "--out", out, "--device", self.sizes.device
        )
        return np.array([json.loads(line)["score"] for line in out.read_text().splitlines()])

    def labels(self) -> Path:
        """One pair a prompt, labelled by `luban annotate`."""
        given = self.answers(
            self.start, self.labelled, 2, max_tokens=self.sizes.max_tokens, seed=self.seed, device=self.sizes.device
        )
        rows = [
            {"prompt": p, "output_1": a or ".", "output_2": b or "."}
            for p, (a, b) in zip(self.labelled, given, strict=True)
        ]
        pool = self.folder / "pool.toml"
        judges = "".join(f'[[annotator]]\nname = "gold {i}"\nmodel = "gold"\n\n' for i in range(3))
        pool.write_text(
            f'noise = {NOISE}\n\n{judges}[[annotator]]\nname = "length"\nmodel = "rule:longest"\n\n[models]\ngold = ""\n'
        )
        out = self.folder / "labels"
        self.luban(
            *("annotate", self.write("to-label.jsonl", rows), "--pool", pool, "--models", f"gold={self.judge}"),
            *("--everyone", min(50, len(rows)), "--seed", self.seed, "--device", self.sizes.device, "--out", out),
        )
        self.agreement = json.loads((out / "agreement.json").read_text())
        return out / "preferences.jsonl"


def spearman(first: dict[str, float], second: dict[str, float]) -> float:
    """Spearman's rank correlation of the methods that both have, equal values sharing the mean of their ranks; NaN where all
    are equal."""
    names = sorted(first.keys() & second.keys())

    def ranks(values: dict[str, float]) -> np.ndarray:
        found = np.array([values[name] for name in names])
        return np.array([(found < v).sum() + ((found == v).sum() - 1) / 2 for v in found])

    one, other = ranks(first), ranks(second)
    return float(np.corrcoef(one, other)[0, 1]) if one.std() and other.std() else math.nan


def checks(values: dict[str, float]) -> dict[str, bool]:
    """The paper's orders, on the mean gold value over seeds."""
    return {
        "PPO and best-of-16 are above expert iteration": min(values["ppo"], values["best_of_16"]) > values["expert"],
        "expert iteration is above sft": values["expert"] > values["sft"],
        "feedme isn't above expert iteration": values["feedme"] < values["expert"],
        "DPO is above feedme": values["dpo"] > values["feedme"],
    }


def report(found: Sequence[dict[str, Any]], people: dict[str, float]) -> dict[str, Any]:
    """Print the table of all seeds; the means of it."""
    means = {
        name: {
            key: statistics.mean(each["methods"][name][key] for each in found)
            for key in ("gold", "win_rate", "seconds")
        }
        for name in METHODS
    }
    print(f"\n{'method':12}{'gold':>8}{'win rate':>10}{'95% interval':>18}{'seconds':>9}{'people':>8}")
    for name, row in sorted(means.items(), key=lambda each: -each[1]["gold"]):
        low, high = found[0]["methods"][name]["interval"]
        span = f"{low:.3f} to {high:.3f}" if len(found) == 1 else f"{len(found)} seeds"
        print(
            f"{name:12}{row['gold']:8.3f}{row['win_rate']:10.3f}{span:>18}{row['seconds']:9.1f}{people.get(name, ''):>8}"
        )
    rank = spearman({name: row["gold"] for name, row in means.items()}, people)
    print(f"Spearman with people's ranking of {len(means.keys() & people.keys())} methods: {rank:.2f}")
    for name, fit in found[0]["overoptimisation"].items():
        print(f"reward model as a proxy, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in fit.items()))
    print(f"labels: {json.dumps(found[0]['agreement'])}")
    return {"methods": means, "spearman": rank}


def study(given: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All methods of one seed."""
    with tempfile.TemporaryDirectory() as folder:
        if given.toy:
            sizes = TOY if not given.tiny else replace(TOY, steps=dict.fromkeys(TOY.steps, 4))
            farm: Farm = ToyFarm(Path(folder), seed, sizes, 24 if given.tiny else 384)
        else:
            tiny = replace(TOY, steps=dict.fromkeys(TOY.steps, 4), batch=4, answers=8, max_tokens=8, longest=250)
            sizes = replace(tiny, flags=("--train.seq_len", 768)) if given.tiny else GPU
            counts = (60, 12) if given.tiny else (given.pairs, 300)
            farm = RealFarm(Path(folder), seed, sizes, Path(given.preferences), given.model, *counts)
        methods = farm.measured()
        proxied = farm.overoptimised(*((4, 8) if given.tiny else (64, 64)))
        return {"methods": methods, "agreement": farm.agreement, "overoptimisation": proxied, "seed": seed}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="letters with a known gold reward, on a CPU")
    parser.add_argument("--preferences", help="AlpacaEval's pairs with GPT-4's labels, .jsonl or .jsonl.gz")
    parser.add_argument("--model", default="smollm2", help="what every method starts from (a chat model)")
    parser.add_argument("--device", default="cuda", choices=("cuda",), help="of the real loop")
    parser.add_argument("--pairs", type=int, default=6000, help="that the gold reward model is trained on")
    parser.add_argument("--seeds", type=int, default=0, help="(default: 3 with --toy, else 1)")
    parser.add_argument("--humans", help="JSON file, method: rate, in the place of AlpacaFarm's table")
    parser.add_argument("--tiny", action="store_true", help="a few steps: shows that it runs")
    parser.add_argument("--out", default="farm")
    given = parser.parse_args(argv)
    if not given.toy and not given.preferences:
        parser.error("give --toy, or --preferences FILE")
    people = json.loads(Path(given.humans).read_text()) if given.humans else PEOPLE
    found = []
    for seed in range(given.seeds or (3 if given.toy and not given.tiny else 1)):
        found.append(study(given, seed))
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    means = report(found, people)
    results = checks({name: row["gold"] for name, row in means["methods"].items()}) if given.toy else {}
    for name, held in results.items():
        print(f"{'held  ' if held else 'FAILED'} {name}")
    Path(f"{given.out}.json").write_text(json.dumps({"seeds": found, **means, "checks": results}, indent=1) + "\n")
    return 0 if all(results.values()) or given.tiny else 1


if __name__ == "__main__":
    sys.exit(main())
