"""Tuning SmolLM2-135M on one GPU: adapters beside full tuning, a reward model, and GRPO on arithmetic.

    python benchmarks/tuning.py e2e --data e2e-valid.txt --out tuning
    python benchmarks/tuning.py problems --data gsm8k-train.jsonl --seeds 3 --jobs 8 --out tuning
    python benchmarks/tuning.py reward --data alpaca_eval_gpt4.jsonl.gz --out tuning
    python benchmarks/tuning.py grpo --out tuning

e2e: restaurants' attributes into sentences (Novikova et al. 2017), split by meaning; LoRA of at most 1% of the parameters and full
tuning, BLEU of sacrebleu over all references. problems: word problems that are made here and those of GSM8K, split by problem; prefix,
series, parallel, LoRA and full tuning, equally many steps, share of right final numbers (Hu et al. 2023, LLM-Adapters). reward: pairs
of AlpacaEval in random order, instructions held out; accuracy where lengths are alike. grpo: sums, differences and products; the share
of right answers before and after.

Each row is a `luban` command; what they print is kept in OUT/logs. --jobs run at once on one GPU. --steps shortens a trial.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

LUBAN = (sys.executable, "-m", "luban")
PRECISION = "bfloat16" if torch.cuda.is_available() else "float32"
DEVICE = ["--train.device", "auto", "--train.precision", "bf16" if torch.cuda.is_available() else "fp32"]
Command = list[str]
# Arguments of `luban sft` for 135M parameters, about a million trained ones where the kind allows it, and a learning rate.
METHODS: dict[str, list[str]] = {
    "full": ["--optim.lr", "2e-4"],
    "lora": ["--adapter.type", "lora", "--adapter.rank", "4", "--adapter.alpha", "8", "--optim.lr", "2e-3"],
    "series": ["--adapter.type", "pfeiffer", "--adapter.width", "32", "--optim.lr", "2e-3"],
    "parallel": ["--adapter.type", "parallel", "--adapter.width", "32", "--optim.lr", "2e-3"],
    "prefix": ["--adapter.type", "prefix", "--adapter.length", "30", "--optim.lr", "2e-3"],
}
TASK = """
data = "{file}"
prompt = "{{{{question}}}}"
target = "{{{{answer}}}}"

[kind]
type = "generate"
max_tokens = {tokens}
metrics = ["{metric}"]
"""


def run(name: str, commands: Sequence[Command], logs: Path) -> bool:
    """Run commands one after another until one fails; what they print goes to logs/NAME.log."""
    with (logs / f"{name}.log").open("w") as log:
        for command in commands:
            if subprocess.run([*LUBAN, *command], stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
                print(f"{name} failed: {(logs / f'{name}.log').read_text().strip().splitlines()[-1][:200]}", flush=True)
                return False
    return True


def at_once(jobs: dict[str, list[Command]], out: Path, count: int) -> None:
    """Run jobs, `count` at a time."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda job: run(*job, out / "logs"), jobs.items()))


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def conversation(question: str, answer: str) -> dict:
    """A row of `luban sft`."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def task(path: Path, rows: Sequence[dict], metric: str, tokens: int) -> Path:
    """A task file and its items."""
    write_rows(path.with_suffix(".jsonl"), rows)
    path.write_text(TASK.format(file=path.with_suffix(".jsonl").name, metric=metric, tokens=tokens))
    return path


def figure(folder: Path, name: str) -> tuple[float, list[float]] | None:
    """Value and interval of an evaluation's figure."""
    if not (folder / "results.json").exists():
        return None
    found = json.loads((folder / "results.json").read_text())
    row = found.get("figures", found)[name]
    return row["value"], row["interval"]


def sft(
    args: argparse.Namespace, train: Path, method: str, seed: int, steps: int, tasks: dict[str, Path]
) -> list[Command]:
    """Commands that tune and measure."""
    name = str(args.out / "runs" / f"{train.stem}-{method}-{seed}")
    command = ["sft", "luban_sft_gpu", "--init", args.model, "--data.path", str(train), *METHODS[method], *DEVICE]
    command += ["--train.steps", str(steps), "--train.batch_size", str(args.rows), "--train.seq_len", "256"]
    command += ["--train.seed", str(seed), "--validation.every", "0", "--validation.patience", "0"]
    command += ["--checkpoint.every", str(steps), "--out", name]
    measured = [
        [
            "eval",
            name,
            str(file),
            "--chat",
            "on",
            "--precision",
            PRECISION,
            "--cache-gb",
            "2",
            "--out",
            f"{name}-{kind}",
        ]
        for kind, file in tasks.items()
    ]
    return [command, *measured]


def e2e(args: argparse.Namespace) -> None:
    """LoRA beside full tuning by BLEU."""
    wordings: dict[str, list[str]] = {}
    for line in Path(args.data).read_text().splitlines():
        meaning, _, wording = line.partition("||")
        wordings.setdefault(meaning.strip(), []).append(wording.strip())
    meanings = sorted(wordings)
    random.Random(0).shuffle(meanings)
    held, asked = meanings[: min(120, len(meanings) // 2)], "Put this into a sentence: {}"
    rows = [conversation(asked.format(m), text) for m in meanings[len(held) :] for text in wordings[m]]
    train = write_rows(args.out / "data" / "e2e.jsonl", rows)
    items = [{"question": asked.format(m), "answer": wordings[m]} for m in held]
    tasks = {"bleu": task(args.out / "data" / "e2e-test.toml", items[: args.items or None], "bleu", 96)}
    compare(args, train, ("full", "lora"), args.steps or 250, tasks, {"bleu": "bleu"})


def problem(rng: random.Random) -> tuple[str, str]:
    """A question of two steps and its worked answer, which ends as GSM8K's do."""
    name = rng.choice(["Ada", "Ben", "Chen", "Dora", "Emil", "Fay", "Gus", "Hana"])
    thing = rng.choice(["apples", "books", "coins", "pens", "stamps", "shells"])
    a, b, c = rng.randint(3, 40), rng.randint(2, 30), rng.randint(2, 9)
    kind = rng.randrange(4)
    if kind == 0:
        steps = [f"{a} + {b} = {a + b}", f"{a + b} * {c} = {(a + b) * c}"]
        text = f"{name} has {a} {thing} and buys {b} more. A friend has {c} times as many as {name} has then. How many has the friend?"
        value = (a + b) * c
    elif kind == 1:
        steps = [f"{a} * {c} = {a * c}", f"{a * c} + {b} = {a * c + b}"]
        text = (
            f"{name} fills {c} boxes with {a} {thing} each and has {b} {thing} left over. How many {thing} are there?"
        )
        value = a * c + b
    elif kind == 2:
        steps = [f"{a + b} - {b} = {a}", f"{a} * {c} = {a * c}"]
        text = f"{name} had {a + b} {thing}, lost {b} and sold the rest at {c} dollars each. How many dollars did {name} get?"
        value = a * c
    else:
        steps = [f"{a * c} / {c} = {a}", f"{a} + {b} = {a + b}"]
        text = f"{name} divides {a * c} {thing} among {c} children; one of them has {b} already. How many has this child then?"
        value = a + b
    return text, "\n".join(steps) + f"\n#### {value}"


def problems(args: argparse.Namespace) -> None:
    """Kinds of adapters beside full tuning by right final numbers."""
    rng = random.Random(0)
    made = list(dict.fromkeys(problem(rng) for _ in range(6000)))
    school = [(row["question"], row["answer"]) for row in map(json.loads, Path(args.data).read_text().splitlines())]
    rng.shuffle(school)
    train = [conversation(*row) for row in made[300:] + school[200:]]
    rng.shuffle(train)
    items = {"made": made[:300], "gsm8k": school[:200]}
    tasks = {
        kind: task(
            args.out / "data" / f"{kind}.toml",
            [{"question": q, "answer": a} for q, a in rows[: args.items or None]],
            "number",
            160,
        )
        for kind, rows in items.items()
    }
    file = write_rows(args.out / "data" / "problems.jsonl", train)
    compare(args, file, tuple(args.methods), args.steps or 300, tasks, dict.fromkeys(tasks, "number"))


def compare(
    args, train: Path, methods: tuple[str, ...], steps: int, tasks: dict[str, Path], figures: dict[str, str]
) -> None:
    """Tune by every method with every seed, and print means."""
    runs = args.out / "runs"
    jobs = {
        f"{train.stem}-{method}-{seed}": sft(args, train, method, seed, steps, tasks)
        for seed in range(args.seeds)
        for method in methods
    }
    at_once(jobs, args.out, args.jobs)
    for method in methods:
        row: dict[str, object] = {"data": train.stem, "method": method, "steps": steps}
        for kind, name in figures.items():
            found = [figure(runs / f"{train.stem}-{method}-{seed}-{kind}", name) for seed in range(args.seeds)]
            values = [value for value, _ in filter(None, found)]
            row[kind] = {"mean": round(statistics.mean(values), 4) if values else None, "seeds": values}
            if len(values) == 1 and found[0]:
                row[kind] = {"value": values[0], "interval": found[0][1]}
        print(json.dumps(row), flush=True)


def reward(args: argparse.Namespace) -> None:
    """Accuracy of a reward model on held-out instructions."""
    rng = random.Random(0)
    with gzip.open(args.data, "rt") as file:
        pairs = [json.loads(line) for line in file]
    rows = []
    for pair in pairs:
        answers = [pair["output_1"], pair["output_2"]]
        chosen = int(pair["preferred"]) - 1
        rows.append({"prompt": pair["instruction"], "chosen": answers[chosen], "rejected": answers[1 - chosen]})
    rng.shuffle(rows)
    train = write_rows(args.out / "data" / "pairs.jsonl", rows)
    name, steps = str(args.out / "runs" / "reward"), str(args.steps or 700)
    command = [
        "reward",
        "luban_reward_gpu",
        "--train.batch_size",
        str(args.rows),
        "--init",
        args.model,
        "--data.path",
        str(train),
        "--train.steps",
        steps,
    ]
    command += [
        "--optim.lr",
        "3e-5",
        "--validation.every",
        "0",
        "--checkpoint.every",
        steps,
        "--train.device",
        "auto",
        "--out",
        name,
    ]
    at_once({"reward": [command]}, args.out, 1)
    manifest = Path(name) / "manifest.json"
    if manifest.exists():
        print(json.dumps({"reward": json.loads(manifest.read_text())["figures"]}), flush=True)


def sums(count: int, seed: int) -> list[dict]:
    """Sums, differences and products of small numbers."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        a, b, sign = rng.randint(2, 60), rng.randint(2, 60), rng.choice("+-*")
        if sign == "*":
            a, b = a % 13 + 2, b % 13 + 2
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        rows[f"What is {a} {sign} {b}?"] = {"prompt": f"What is {a} {sign} {b}?", "answer": str(value)}
    return list(rows.values())


def grpo(args: argparse.Namespace) -> None:
    """Share of right answers before and after GRPO."""
    every = sums(2200, 0)
    train = write_rows(args.out / "data" / "sums.jsonl", every[200:])
    items = [{"question": row["prompt"], "answer": row["answer"]} for row in every[: args.items or 200]]
    file = task(args.out / "data" / "sums-test.toml", items, "number", 48)
    name, steps = str(args.out / "runs" / "grpo"), str(args.steps or 80)
    measure = ["--chat", "on", "--precision", PRECISION, "--cache-gb", "2", "--out"]
    command = ["rl", "luban_rl_gpu", "--init", args.model, "--data.path", str(train), "--reward", "gsm8k"]
    command += ["--rl.prompts", str(args.rows // 2), "--rl.samples", "8", "--rl.max_tokens", "48"]
    command += ["--train.batch_size", str(4 * args.rows)]
    command += ["--train.seq_len", "160", "--train.steps", steps, "--optim.lr", "1e-5", "--validation.every", "0"]
    command += ["--checkpoint.every", steps, *DEVICE, "--out", name]
    at_once(
        {
            "before": [["eval", args.model, str(file), *measure, f"{name}-before"]],
            "grpo": [command, ["eval", name, str(file), *measure, f"{name}-after"]],
        },
        args.out,
        2,
    )
    found = {when: figure(Path(f"{name}-{when}"), "number") for when in ("before", "after")}
    metrics = Path(name) / "metrics.jsonl"
    rewards = (
        [row["reward"] for row in map(json.loads, metrics.read_text().splitlines()) if "reward" in row]
        if metrics.exists()
        else []
    )
    curve = [round(statistics.mean(rewards[i : i + 10]), 3) for i in range(0, len(rewards), 10)]
    print(json.dumps({"grpo": found, "reward by tens of steps": curve}), flush=True)


def main() -> None:
    """Run one experiment."""
    experiments: dict[str, Callable[[argparse.Namespace], None]] = {
        "e2e": e2e,
        "problems": problems,
        "reward": reward,
        "grpo": grpo,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=experiments)
    parser.add_argument("--data", help="the experiment's file")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of problems")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--rows", type=int, default=32, help="of a step")
    parser.add_argument("--items", type=int, default=0, help="of the evaluations, at most (0: all)")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    experiments[args.what](args)


if __name__ == "__main__":
    main()
