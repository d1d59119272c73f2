"""`luban judge A.jsonl B.jsonl --judge MODEL --out DIR`: which answers are better."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from luban.core.arguments import parse
from luban.core.log import print_result, say

ABOUT = """Compare models' answers by a judge, each pair in both orders: a verdict that depends on the order is a tie.

Two or more files hold one model's answers each (prompt and answer a row; answers.jsonl of an evaluation is such a file) and are
compared two by two. A single file of answers is graded, each from 1 to 10. A single file may hold pairs: instruction, output_1, output_2, optional generator_1, generator_2 and preference
(a person's: 1, 2, 0), or prompt, chosen, rejected.

The judge is a model (a run, a Hugging Face directory, smollm2), a reward model of luban reward, the address of an
OpenAI-compatible server, a rule (rule:longest, rule:shortest, rule:reference, rule:first), or human: the preferences in the file.

DIR holds results.json (win rate, length-controlled win rate, ties, agreement, ratings: value, interval of 95%, n),
judgements.jsonl and leaderboard.html."""
EXAMPLES = """
luban judge a.jsonl b.jsonl --judge smollm2 --out runs/judged
luban judge a.jsonl b.jsonl c.jsonl --judge runs/rm --out runs/leaderboard
luban judge a.jsonl b.jsonl --judge http://127.0.0.1:8000/v1 --template mine.toml --repeat --out runs/judged
luban judge answers.jsonl --judge smollm2 --out runs/graded
luban judge alpaca_eval.jsonl --judge rule:longest --out runs/longest
luban judge alpaca_eval.jsonl --judge human --out runs/people
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    # answers, or one of pairs
    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FILE.jsonl")]
    judge: str  # a model, a reward model, rule:NAME or an address
    out: Path  # the directory to make
    template: str = ""  # how a model is asked: default, likelihood or calibrated (small models), or a .toml file
    humans: Path | None = None  # people's preferences over the first two files: id or prompt, preference
    repeat: bool = False  # ask twice, and say how far the judge agrees with itself
    limit: int = 0  # pairs of each two files at most (0: all)
    device: str = "auto"  # cpu, cuda, or auto
    model_name: str = ""  # the judge's name at its address
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key for a server


def run(argv: Sequence[str]) -> int:
    args = parse(Arguments, argv, verb="judge", about=ABOUT, examples=EXAMPLES)
    from luban.align.judges import open_judge
    from luban.cli.eval import figure_line
    from luban.core.errors import UsageError
    from luban.evals.judges.pairs import LabelJudge, holds_pairs, match_files, read_pairs
    from luban.evals.judges.pairwise import run_judge
    from luban.evals.run import EvalOptions

    if not args.files:
        raise UsageError("luban judge takes two files of answers, or one of pairs (see luban judge --help)")
    if len(args.files) == 1 and not holds_pairs(args.files[0]):
        return _grade(args)
    if len(args.files) == 1:
        matches = read_pairs(args.files[0], args.limit)
    else:
        matches = match_files(args.files, args.limit, args.humans)
    options = EvalOptions(device=args.device, api_key=os.environ.get(args.api_key_env, ""))
    ask = partial(open_judge, args.judge, options, template=args.template, model_name=args.model_name)
    human = args.judge == "human"
    judge = LabelJudge(matches) if human else ask()
    again = ask(sample=1) if args.repeat and not human else None
    say(f"{len(matches)} pairs, judged by {judge.name} in both orders")
    for name, entry in run_judge(judge, matches, args.out, again=again).items():
        print(figure_line(name, entry))
    print_result(args.out / "leaderboard.html")
    return 0


def _grade(args: Arguments) -> int:
    """Single answers."""
    from luban.align.judges import open_judge
    from luban.cli.eval import figure_line
    from luban.evals.judges.grades import run_grades
    from luban.evals.run import EvalOptions

    options = EvalOptions(device=args.device, api_key=os.environ.get(args.api_key_env, ""))
    judge = open_judge(args.judge, options, template=args.template, model_name=args.model_name)
    for name, entry in run_grades(judge, args.files[0], args.out, args.limit).items():
        print(figure_line(name, entry))
    print_result(args.out / "judgements.jsonl")
    return 0
