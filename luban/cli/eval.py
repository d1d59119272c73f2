"""`luban eval MODEL TASK… --out DIR`: measure a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from luban.core.arguments import parse
from luban.core.errors import UsageError

ABOUT = """Measure a model. TASK is one of bits_per_byte, answer_loss, which_module, samples, altered_sentence,
needle (facts found by length and depth), context_length (loss by position, time and memory by length; on the held-out documents of --corpus),
chomsky, checklist (--principles), a task file that ships ({shipped}), a .toml file of your own, or a .yaml file of
lm-evaluation-harness over local data.

MODEL is anything that loads, or the address of an OpenAI-compatible server. DIR holds results.json (figure: value, interval of
95%, n), answers.jsonl (each item with prompt, answer, scores) and responses.jsonl (what was asked and answered). The same
command resumes what was interrupted; luban report DIR… compares. docs/EVALUATION.md explains task files."""
EXAMPLES = """
luban eval smollm2 arithmetic_add_2 --shots 5 --limit 100 --out runs/eval
luban eval runs/sft gsm8k --data gsm8k-test.jsonl --chat on --shots 0 --out runs/gsm8k
luban eval smollm2 mmlu --data mmlu/test --shots 5 --limit 200 --contamination corpus --out runs/mmlu
luban eval smollm2 humaneval --data HumanEval.jsonl.gz --repeats 10 --temperature 0.8 --out runs/humaneval
luban eval smollm2 arithmetic_add_2 --adapter runs/lora --out runs/with_lora
luban eval runs/a bits_per_byte --corpus corpus --out runs/eval
luban eval http://127.0.0.1:8000/v1 my_task.toml --chat on --out runs/served
luban eval runs/sft dialogue.toml --judge smollm2 --chat on --out runs/graded
luban eval runs/sft checklist --principles mine.toml --chat on --sign-off "A. Name" --out runs/release
"""


@dataclass(frozen=True)
class Args:
    """Options."""

    model: Positional[str]  # a run, a checkpoint, a Hugging Face directory, smollm2, or a server's address
    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]  # what is measured
    out: Path  # the evaluation's directory
    adapter: str | None = None  # a run of adapters or a PEFT directory, over MODEL
    shots: int | None = None  # worked examples before each item (default: as the task says)
    limit: int = 0  # items a task at most, the first ones (0: all)
    data: str = ""  # the task's data, where it brings none: a file, a folder or a corpus
    chat: Literal["off", "on", "turns"] = "off"  # chat template: none, around all, or each shot as turns of its own
    repeats: int | None = None  # answers to each item (default: as the task says)
    temperature: float | None = None  # of written answers, 0: greedy (default: as the task says)
    seed: int = 0  # of drawn shots and of samples
    corpus: tuple[Path, ...] = ()  # corpora whose held-out split is measured on
    contamination: tuple[Path, ...] = ()  # corpora or files that items are looked for in, by GPT-3's rule
    judge: str = ""  # for tasks of kind judge: a model, rule:NAME, or an address
    judge_name: str = ""  # the judge's name at its address
    cache: Path | None = None  # folder of answers that evaluations of one model share
    device: str = "auto"  # cpu, cuda, or auto
    precision: Literal["float32", "bfloat16"] = "float32"  # arithmetic
    batch_tokens: int = 8192  # tokens of a batch, padding included
    batch_invariant: bool = False  # numbers bit for bit those of each request alone (slower)
    cache_gb: float | None = None  # memory for keys and values, GB; none: as much as is free, on a CPU half of it
    model_name: str = ""  # MODEL's name at its address (default: the first that the server lists)
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key for a server
    timeout: float = 120.0  # seconds that a server has for an answer
    tries: int = 4  # of a request to a server
    principles: Path | None = None  # file of the task checklist (default: six that ship)
    sign_off: str = ""  # who signs the checklist for a release; refused where a principle doesn't hold


def run(argv: Sequence[str]) -> None:
    """Measure, print the figures, write the evaluation artifact."""
    from luban.evals.names import shipped_tasks

    about = ABOUT.format(shipped=", ".join(shipped_tasks()))
    args = parse(Args, argv, verb="eval", about=about, examples=EXAMPLES)
    from luban.align.judges import open_judge
    from luban.evals.run import EvalOptions, evaluate

    shared = {field.name: getattr(args, field.name) for field in fields(EvalOptions) if hasattr(args, field.name)}
    options = EvalOptions(
        **shared,
        corpora=args.corpus,
        api_key=os.environ.get(args.api_key_env, ""),
    )
    if args.cache_gb is not None and args.cache_gb <= 0:
        raise UsageError(f"--cache-gb must be larger than 0, {args.cache_gb:g} given")
    judge = open_judge(args.judge, options, model_name=args.judge_name) if args.judge else None
    found = evaluate(args.model, args.tasks, args.out, options, judge)
    for name, entry in found.results.items():
        print(figure_line(name, entry))
    for name, count in sorted(found.counts.items()):
        if count:
            print(f"{name:<28} {count}")


def figure_line(name: str, entry: dict[str, Any]) -> str:
    """A figure with its interval."""
    value = entry["value"]
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    if entry.get("interval"):
        low, high = entry["interval"]
        return f"{name:<28} {text}  [{low:.4f}, {high:.4f}]  n = {entry['n']}"
    return f"{name:<28} {text}"
