"""AlpacaFarm's methods beside each other from one start (Dubois et al. 2023), on simulated annotators.

    python benchmarks/alpaca_farm.py --toy --out farm                                  # CPU, a known gold reward, three seeds
    python benchmarks/alpaca_farm.py --preferences alpaca_eval_gpt4.jsonl.gz --budget 420 --out farm      # SmolLM2 on one GPU
    python benchmarks/alpaca_farm.py --preferences FILE --small --seeds 3 --budget 420 --out small        # three short seeds of it
    python benchmarks/alpaca_farm.py --preferences FILE --model RUN --tiny --out farm  # the second one's path on a CPU

Every method starts from the same model and reads the same labels: pairs of that model's answers, one in four labelled the wrong way
round. What an answer is worth is told by the gold reward alone, which no method sees.

sft: the model itself. feedme: tuned on the winners. conditioned: tuned on winners and losers behind a sentence that says which, and
asked for winners. dpo. The others use a reward model of the labels: best_of_n at decoding (--toy 64, else 16; AlpacaFarm 1024); expert:
tuned on the best of 16 to prompts without labels; quark and ppo: `luban rl` on those prompts.

--toy: answers of six random letters; gold is the share of vowels; annotators draw from Bradley and Terry's model, then flip. Gold and
labels are known exactly, so the orders that the paper reports are checked (`checks`).
Else: two reward models of AlpacaEval's pairs as GPT-4 judged them, each of half of the instructions. One is the annotators' gold and labels
through `luban annotate`; the other measures: win rates are against the start's answers to held-out instructions. The alignment tax is
drawn in OUT/seed-0/tax.html.

Every stage is made once and kept in OUT, and its seconds are printed: the same command goes on where the last one stopped. Nothing is begun
after --budget seconds, which ends with exit code 3. The reward model is also measured as a proxy for gold: Gao's curves (Gao et al. 2023) of
the start's answers that both score.

Printed: value of answers and win rate with a 95% interval, seconds of training, agreement of the labels, Spearman's correlation of the methods'
ranks with people's (AlpacaFarm's table 2, or --humans FILE.json of method: rate). Writes OUT.json; --toy exits 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from farm_methods import METHODS, Farm, Sizes
from farm_real import GPU, SMALL, TINY, Judges, RealFarm
from farm_toy import TOY, ToyFarm
from toy_runs import OutOfTimeError

from luban.core.metrics.agreement import spearman

PEOPLE = {"ppo": 55.1, "best_of_n": 50.7, "expert": 45.7, "sft": 44.3, "feedme": 37.9}  # win rates by people (table 2)
REAL = ("sft", "feedme", "best_of_n", "expert", "dpo", "ppo")  # methods of the real loop, unless --methods says others
UNFINISHED = 3  # exit code where the budget is spent


def checks(found: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """The paper's orders, on the mean over seeds; where the paper has two methods level (FeedME's 36.6 and SFT's 36.7% in
    simulation), that the difference is small beside what expert iteration gains."""
    values = {name: statistics.mean(each["methods"][name]["value"] for each in found) for name in found[0]["methods"]}
    gained = {name: value - values["sft"] for name, value in values.items()}
    return {
        "PPO and best-of-n are above expert iteration": min(values["ppo"], values["best_of_n"]) > values["expert"],
        "expert iteration is above sft": gained["expert"] > 0,
        "feedme gains less than half of what expert iteration does": gained["feedme"] < gained["expert"] / 2,
        "DPO is above feedme": values["dpo"] > values["feedme"],
        "labels agree with gold in 75 ± 2% at most": max(each["agreement"]["with gold"] for each in found) < 0.77,
        "the reward model agrees with gold more often than its labels do": all(
            each["agreement"]["reward model with gold"] > each["agreement"]["with gold"] for each in found
        ),
    }


def report(found: Sequence[dict[str, Any]], people: dict[str, float]) -> dict[str, Any]:
    """Print the table of all seeds; the means of it."""
    names = [name for name in METHODS if all(name in each["methods"] for each in found)]
    keys = ("value", "win_rate", "characters", "seconds")
    means = {name: {k: statistics.mean(each["methods"][name][k] for each in found) for k in keys} for name in names}
    print(
        f"\n{'method':12}{'value':>8}{'win rate':>10}  {'by seed, with intervals':42}{'letters':>8}{'seconds':>9}{'people':>8}"
    )
    for name, row in sorted(means.items(), key=lambda each: -each[1]["win_rate"]):
        each = [seed["methods"][name] for seed in found]
        spans = ", ".join(f"{m['win_rate']:.2f} ({m['interval'][0]:.2f}–{m['interval'][1]:.2f})" for m in each)
        print(
            f"{name:12}{row['value']:8.3f}{row['win_rate']:10.3f}  {spans:42}{row['characters']:8.0f}{row['seconds']:9.1f}"
            f"{people.get(name, ''):>8}"
        )
    both = sorted(means.keys() & people.keys())
    rank = math.nan
    if len(both) > 1:
        rank = spearman([means[name]["win_rate"] for name in both], [people[name] for name in both])
        print(f"Spearman with people's ranking of {len(both)} methods: {rank:.2f}")
    for name, fit in found[0]["overoptimisation"].items():
        print(f"reward model as a proxy, {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in fit.items()))
    print(f"labels: {json.dumps(found[0]['agreement'])}")
    return {"methods": means, "spearman": rank}


def sizes_of(given: argparse.Namespace) -> Sizes:
    """What is spent."""
    if not given.toy:
        return TINY if given.tiny else replace(SMALL if given.small else GPU, device=given.device)
    if not given.tiny:
        return TOY
    return replace(TOY, prompts=24, held=16, steps=dict.fromkeys(TOY.steps, 4), best_of=16, curve=(4, 32))


def seed_of(given: argparse.Namespace, sizes: Sizes, seed: int, deadline: float) -> dict[str, Any]:
    """All methods of one seed."""
    folder, kept = Path(given.out), {"deadline": deadline, "shown": True}
    if given.toy:
        farm: Farm = ToyFarm(folder / f"seed-{seed}", seed, sizes, **kept)
    else:
        longest, pairs, steps = (250, 60, 2) if given.tiny else (given.longest, given.pairs, given.reward_steps)
        file = Path(given.preferences)
        judges = Judges(folder / "judges", sizes, file, given.model, pairs, longest, steps, **kept)
        farm = RealFarm(folder / f"seed-{seed}", seed, sizes, judges, **kept)
    found = {"seed": seed, "methods": farm.measured(given.methods), "agreement": farm.agreement()}
    found["overoptimisation"] = farm.overoptimised()
    if isinstance(farm, RealFarm) and given.tax and not seed:
        print(f"alignment tax: {farm.tax(given.methods, given.tax)}")
    return found


def require_settings(given: argparse.Namespace, sizes: Sizes) -> None:
    """Exit with a message where OUT holds what other settings made."""
    kept, file = (
        ("toy", "tiny", "preferences", "model", "pairs", "longest", "reward_steps"),
        Path(given.out) / "settings.json",
    )
    asked = {name: getattr(given, name) for name in kept} | {"sizes": asdict(sizes)}
    text = json.dumps(asked, indent=1, sort_keys=True)
    if file.exists() and file.read_text() != text:
        raise SystemExit(f"{given.out} holds stages made with other settings ({file}): give another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="letters with a known gold reward, on a CPU")
    parser.add_argument("--preferences", help="AlpacaEval's pairs with GPT-4's labels, .jsonl or .jsonl.gz")
    parser.add_argument("--model", default="smollm2", help="what every method starts from (a chat model)")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="of the real loop")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, help="(default: all with --toy, else without the last)"
    )
    parser.add_argument(
        "--pairs", type=int, default=6000, help="that each of the two judging reward models is trained on"
    )
    parser.add_argument("--reward_steps", type=int, default=200, help="of training those")
    parser.add_argument("--longest", type=int, default=1500, help="characters of a published prompt or answer")
    parser.add_argument(
        "--tax", type=int, default=100, help="items a task for the first seed's alignment tax (0: none)"
    )
    parser.add_argument("--seeds", type=int, default=0, help="(default: 3 with --toy, else 1)")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no stage is begun")
    parser.add_argument("--humans", help="JSON file, method: rate, in the place of AlpacaFarm's table")
    parser.add_argument("--tiny", action="store_true", help="a few steps: shows that it runs")
    parser.add_argument(
        "--small", action="store_true", help="of the real loop: fewer prompts, shorter answers and trainings"
    )
    parser.add_argument("--out", default="farm")
    given = parser.parse_args(argv)
    if not given.toy and not given.preferences:
        parser.error("give --toy, or --preferences FILE")
    given.methods = given.methods or list(METHODS if given.toy else REAL)
    people = json.loads(Path(given.humans).read_text()) if given.humans else PEOPLE
    sizes, deadline, found = sizes_of(given), time.perf_counter() + given.budget, []
    require_settings(given, sizes)
    for seed in range(given.seeds or (3 if given.toy and not given.tiny else 1)):
        try:
            found.append(seed_of(given, sizes, seed, deadline))
        except OutOfTimeError as stage:
            print(f"--budget is spent before {stage} of seed {seed}: the same command goes on")
            return UNFINISHED
        print(f"seed {seed}: {json.dumps(found[-1])}", flush=True)
    means = report(found, people)
    every = given.toy and set(given.methods) == set(METHODS)
    results = checks(found) if every else {}
    for name, held in results.items():
        print(f"{'held  ' if held else 'FAILED'} {name}")
    Path(f"{given.out}.json").write_text(json.dumps({"seeds": found, **means, "checks": results}, indent=1) + "\n")
    return 0 if all(results.values()) or given.tiny else 1


if __name__ == "__main__":
    sys.exit(main())
