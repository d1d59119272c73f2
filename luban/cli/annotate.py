"""`luban annotate PROMPTS --pool FILE --out PREFS`: preferences from simulated annotators, or from people at a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from luban.core.arguments import parse
from luban.core.log import print_result, say

if TYPE_CHECKING:
    from luban.align.annotate.pool import Annotator, Pool
    from luban.evals.judges.base import Judge

ABOUT = """Label pairs of answers. PROMPTS is a .jsonl file of pairs (instruction or prompt, output_1, output_2, optional preference, a
person's), or of prompts alone, to which --model writes two answers each.

--pool: simulated annotators (AlpacaFarm): one drawn for each pair, the order of the answers drawn, a quarter of the labels
flipped (--noise). alpacafarm ships, 13 annotators of three models; a file of your own names prompts, models, order, batch,
temperature. PREFS is a directory whose preferences.jsonl luban reward and luban dpo read (--data.path PREFS), with labels.jsonl,
agreement.json, tokens and cost.

--constitution: a model (--judge) says under a principle, drawn for each pair, which answer is better; its likelihoods are soft
labels, the probability of each row (Constitutional AI).

--serve: a page where people compare two answers, by mouse or keyboard; labels are in PREFS (SQLite), nothing is lost when the
server dies. --export writes them as preferences."""
EXAMPLES = """
luban annotate pairs.jsonl --pool alpacafarm --models strong=runs/rm middle=smollm2 weak=rule:longest --out runs/prefs
luban annotate prompts.jsonl --model runs/sft --pool mine.toml --everyone 50 --out runs/prefs
luban annotate pairs.jsonl --constitution shipped --judge runs/chat --out runs/prefs
luban annotate pairs.jsonl --serve --annotators ann=key1 ben=key2 --out labels.sqlite
luban annotate pairs.jsonl --export prefs.jsonl --out labels.sqlite
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    prompts: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPTS")]  # .jsonl of pairs or prompts
    out: Path  # directory to make; with --serve and --export the file of labels
    pool: str = ""  # simulated annotators: alpacafarm or a .toml file
    constitution: str = ""  # a model labels by its own likelihoods under principles: file of principles, or shipped
    judge: str = ""  # that model (--constitution)
    chain_of_thought: bool = False  # it reasons first, and its labels are clamped to 40-60% (--constitution)
    models: tuple[str, ...] = ()  # NAME=MODEL for each model of the pool
    noise: float | None = None  # fraction of labels flipped (default: as the pool says, 0.25; 0 for evaluation)
    model: str = ""  # writes two answers to each prompt, where PROMPTS holds prompts alone
    max_tokens: int = 256  # of such an answer
    everyone: int = 0  # pairs that all annotators label, for the table of agreement
    limit: int = 0  # pairs at most (0: all)
    seed: int = 0  # of answers, annotators, order and noise
    price_in: float = 0.0  # for a million tokens read
    price_out: float = 0.0  # for a million tokens written
    device: str = "auto"  # cpu, cuda, or auto
    api_key_env: str = "OPENAI_API_KEY"  # environment variable with the key for a server
    serve: bool = False  # the page for people
    # NAME=KEY of each person who may label (default: one without a key, on this machine only)
    annotators: tuple[str, ...] = ()
    host: str = "127.0.0.1"  # address the page is served at
    port: int = 8765  # its port (0: a free one)
    export: Path | None = None  # .jsonl file to write people's labels to


def run(argv: Sequence[str]) -> int:
    args = parse(Arguments, argv, verb="annotate", about=ABOUT, examples=EXAMPLES)
    from luban.core.errors import DataError, UsageError

    if sum((bool(args.pool), bool(args.constitution), args.serve, args.export is not None)) != 1:
        raise UsageError(
            "luban annotate takes one of --pool FILE, --constitution FILE, --serve and --export FILE (see luban annotate --help)"
        )
    matches = _pairs(args)
    if args.pool:
        return _simulate(args, matches)
    if args.constitution:
        return _prefer(args, matches)
    from luban.align.annotate.labels import LabelStore, export_labels

    if args.export is not None:
        if not args.out.is_file():
            raise DataError(f"{args.out} does not exist: --export writes the labels that --serve kept in it")
        with LabelStore(args.out, matches) as store:
            say(f"{export_labels(store, args.export)} preferences")
        print_result(args.export)
        return 0
    from luban.align.annotate.page import serve_page

    with LabelStore(args.out, matches, annotators=dict(_named(args.annotators, "--annotators", "KEY"))) as store:
        serve_page(store, args.host, args.port, seed=args.seed)
    return 0


def _pairs(args: Arguments) -> list[Any]:
    from luban.evals.judges.pairs import read_pairs
    from luban.evals.run import EvalOptions

    if not args.model:
        return read_pairs(args.prompts, args.limit)
    from luban.align.annotate.sample import answer_pairs

    key = os.environ.get(args.api_key_env, "")
    options = EvalOptions(device=args.device, api_key=key, seed=args.seed)
    return answer_pairs(args.prompts, args.model, options, max_tokens=args.max_tokens, limit=args.limit)


def _simulate(args: Arguments, matches: list[Any]) -> int:
    from dataclasses import replace

    from luban.align.annotate.pool import read_pool
    from luban.align.annotate.simulate import annotate, pool_judge
    from luban.align.judges import open_judge
    from luban.evals.run import EvalOptions

    pool = read_pool(args.pool).with_models(dict(_named(args.models, "--models", "MODEL")))
    if args.noise is not None:
        pool = replace(pool, noise=args.noise)
    options = EvalOptions(device=args.device, api_key=os.environ.get(args.api_key_env, ""))
    opened: dict[str, Any] = {}

    def judge_of(annotator: Annotator, pool: Pool) -> Judge:
        model = pool.models.get(annotator.model, annotator.model)
        template = pool.templates.get(annotator.template, annotator.template)
        return pool_judge(annotator, open_judge(model, options, template=template, seed=args.seed, opened=opened))

    figures = annotate(
        matches,
        pool,
        judge_of,
        args.out,
        seed=args.seed,
        everyone=args.everyone,
        prices=(args.price_in, args.price_out),
    )
    for name, value in figures.items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")
    print_result(args.out / "preferences.jsonl")
    return 0


def _prefer(args: Arguments, matches: list[Any]) -> int:
    """Soft labels of a model's own (Constitutional AI)."""
    from luban.align.constitutional import prefer
    from luban.core.errors import UsageError
    from luban.evals.checklist import read_principles
    from luban.evals.run import EvalOptions, open_backend

    if not args.judge:
        raise UsageError("--constitution needs the model that labels: --judge MODEL")
    principles = read_principles(None if args.constitution == "shipped" else Path(args.constitution))
    backend, _ = open_backend(args.judge, EvalOptions(device=args.device))
    figures = prefer(matches, backend, principles, args.out, chain_of_thought=args.chain_of_thought, seed=args.seed)
    for name, value in figures.items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")
    print_result(args.out / "preferences.jsonl")
    return 0


def _named(pairs: Sequence[str], option: str, what: str) -> list[tuple[str, str]]:
    """NAME=VALUE words. UsageError for others."""
    from luban.core.errors import UsageError

    found = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{option} takes NAME={what}, {pair!r} given")
        found.append((name, value))
    return found
