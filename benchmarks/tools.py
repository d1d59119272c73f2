"""What tools and grammars give a small model, on two CPU cores in minutes.

`calculator`: one model is trained on arithmetic questions, half of them answered with a call of the calculator, half in words
alone, and asked held-out questions both ways.
`sql`: one model is trained on generated databases and questions, and asked about other databases, with its statements held to
the schema's grammar and without. Spider's own files take the place of the generated ones with --data.

    python benchmarks/tools.py calculator --out runs/calculator
    python benchmarks/tools.py sql --out runs/sql --seconds 600
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import random
import subprocess
import sys
import time
from pathlib import Path

from luban.tools.calculator import calculate, calculator, written

PLACES = ("boxes", "pens", "pages", "coins", "stones", "tickets", "cards", "miles")


def question(rng: random.Random) -> tuple[str, str]:
    """(a question in words, its expression)."""
    a, b, c = rng.randrange(11, 1000), rng.randrange(11, 1000), rng.randrange(2, 20)
    thing, other = rng.sample(PLACES, 2)
    return rng.choice(
        (
            (f"What is {a} times {b}?", f"{a} * {b}"),
            (f"What is {a} plus {b} minus {c}?", f"{a} + {b} - {c}"),
            (f"There are {a} {thing} and each has {b} {other}. How many {other} are there?", f"{a} * {b}"),
            (f"Of {a + b} {thing}, {b} are lost. How many {thing} are left?", f"{a + b} - {b}"),
            (f"{a * c} {thing} are shared by {c} people. How many does each get?", f"{a * c} / {c}"),
            (f"A ticket costs {a} and {c} people pay {b} more each. What do they pay together?", f"{c} * ({a} + {b})"),
        )
    )


def conversation(rng: random.Random, *, tool: bool) -> dict:
    """A question with its answer, with or without a call."""
    asked, expression = question(rng)
    result = written(calculate(expression))
    user, answer = {"role": "user", "content": asked}, {"role": "assistant", "content": result}
    if not tool:
        return {"messages": [user, answer]}
    call = {"name": "calculator", "arguments": json.dumps({"expression": expression})}
    calling = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    read = {"role": "tool", "name": "calculator", "content": result}
    return {"messages": [user, calling, read, answer], "tools": [calculator().definition()]}


def luban(*words: object) -> None:
    """Run a verb; its output goes to standard error."""
    command = [sys.executable, "-m", "luban", *map(str, words)]
    subprocess.run(command, check=True, stdout=sys.stderr)


def write_rows(file: Path, rows: list[dict]) -> Path:
    """A .jsonl file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def train(rows: Path, out: Path, args: argparse.Namespace, *, template: Path | None = None, context: int = 512) -> Path:
    """A model of random weights with a vocabulary of the rows' text, tuned on the rows."""
    from safetensors.torch import save_file

    import luban as package
    from luban.models.spec import uniform, write_spec
    from luban.nn.feedforward.gated import SwiGLU
    from luban.nn.mixer.grouped import Grouped

    luban("corpus", "build", rows, "--out", out / "corpus")
    chosen = ("--chat-template", template) if template else ()
    luban(
        "tokenizer",
        "train",
        out / "corpus",
        "--vocab-size",
        1024,
        "--digits",
        "single",
        *chosen,
        "--out",
        out / "tokenizer",
    )
    spec = uniform(
        vocab_size=package.load_tokenizer(out / "tokenizer").vocab_size,
        width=args.width,
        layers=args.layers,
        context=context,
        mixer=Grouped(heads=args.width // 32, kv_heads=args.width // 32),
        feedforward=SwiGLU(width=args.width * 8 // 3),
    )
    start = out / "start"
    start.mkdir(parents=True)
    write_spec(spec, start)
    save_file(dict(package.build_model(spec, seed=0).named_parameters()), start / "model.safetensors")
    (start / "tokenizer").symlink_to((out / "tokenizer").resolve())
    luban(
        "sft",
        "luban_sft_cpu",
        "--init",
        start,
        "--data.path",
        rows,
        "--out",
        out / "run",
        "--train.seq_len",
        context,
        "--train.steps",
        args.steps,
        "--train.budget_seconds",
        args.seconds,
        "--optim.lr",
        args.lr,
        "--train.batch_size",
        args.batch_size,
        "--train.compile",
        "false",
        "--schedule.warmup",
        args.steps // 20,
    )
    return out / "run"


def run_calculator(args: argparse.Namespace) -> dict:
    """Share of held-out questions answered right, with the calculator and without."""
    import luban as package
    from luban.generate.sampling import Sampling
    from luban.tools.loop import run_tools

    rng = random.Random(args.seed)
    rows = [conversation(rng, tool=bool(i % 2)) for i in range(args.rows)]
    template = Path(str(importlib.resources.files("luban.tools") / "chat_template.jinja"))
    file = write_rows(args.out / "rows.jsonl", rows)
    asked = {row["messages"][0]["content"] for row in rows}
    held = [pair for pair in (question(rng) for _ in range(10 * args.questions)) if pair[0] not in asked][
        : args.questions
    ]
    engine = package.Engine(package.load_model(train(file, args.out, args, template=template)))
    greedy = Sampling(max_tokens=80, temperature=0)
    alone = with_tool = called = 0
    for words, expression in held:
        right, messages = written(calculate(expression)), [{"role": "user", "content": words}]
        alone += engine.generate(messages, greedy)[0].text.strip() == right
        run = run_tools(engine, messages, [calculator()], greedy)
        with_tool += run.text.strip() == right
        called += bool(run.calls)
    count = len(held)
    return {"questions": count, "alone": alone / count, "with_calculator": with_tool / count, "called": called / count}


def run_sql(args: argparse.Namespace) -> dict:
    """Execution accuracy on databases that weren't trained on, with the grammar and without."""
    import luban as package
    from luban.tools.sql.generated import conversations, generate
    from luban.tools.sql.spider import evaluate, read_spider

    data = args.data or args.out / "data"
    if args.data is None:
        generate(data, databases=args.databases, questions=args.rows // args.databases, seed=args.seed)
    file = write_rows(args.out / "rows.jsonl", list(conversations(data / "train.json")))
    engine = package.Engine(package.load_model(train(file, args.out, args)))
    examples = read_spider(data / "dev.json")
    random.Random(args.seed).shuffle(examples)
    examples = examples[: args.questions]
    found: dict[str, float] = {"questions": len(examples)}
    for name, constrained in (("with_grammar", True), ("without", False)):
        scored = list(evaluate(engine, examples, constrained=constrained))
        found[name] = sum(one.right for one in scored) / len(scored)
        found[f"{name}_ran"] = sum(not one.problem for one in scored) / len(scored)
    return found


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("calculator", "sql"))
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--data", type=Path, help="of sql: a folder in Spider's layout with train.json and dev.json")
    parser.add_argument("--rows", type=int, default=20_000, help="conversations to train on")
    parser.add_argument("--databases", type=int, default=400, help="generated, a fifth of them held out")
    parser.add_argument("--questions", type=int, default=200, help="held out, that are asked")
    parser.add_argument("--seconds", type=int, default=300, help="of training")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16, help="rows of 512 tokens")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.perf_counter()
    figures = {"calculator": run_calculator, "sql": run_sql}[args.what](args)
    print(json.dumps({**figures, "seconds": round(time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
