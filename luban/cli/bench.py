"""`luban bench serve|collectives|roofline|machine|micro-batch|jobs`: how fast a server answers, processes communicate, a device
computes, and what bounds a model; jobs of a shared cluster in simulation."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from luban.cli import bench_collectives, bench_jobs, bench_machine, bench_micro_batch, bench_roofline
from luban.cli.subverbs import dispatch
from luban.core.arguments import parse

if TYPE_CHECKING:
    from luban.serve.bench.measure import Row

EXAMPLES = """
luban bench serve smollm2 --dtype int8 --rates 0.5 1 2 --requests 16 --prompt-tokens 64 --answer-tokens 32
luban bench serve runs/a --device cuda --dtype bfloat16 --rates 1 4 16 inf --out bench.html
luban bench serve --url http://127.0.0.1:8000 --api-key "$KEY" --prompt-tokens lognormal:256:0.8
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    # to be served in a process of its own; none with --url
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = ""
    url: str | None = None  # an OpenAI-compatible server that runs already
    model_name: str | None = None  # of its models; none: the first that it lists
    api_key: str | None = None  # it asks for
    rates: tuple[str, ...] = ("1", "2", "4", "inf")  # loads: requests a second, as a Poisson process; inf: all at once
    requests: int = 64  # of each load
    prompt_tokens: str = "uniform:32:256"  # lengths of prompts: 64, uniform:32:512 or lognormal:MEDIAN:SIGMA
    answer_tokens: str = "64"  # lengths of answers, likewise
    shared_tokens: int = 0  # that all prompts begin with
    concurrency: int = 512  # requests in flight at most
    keep_eos: bool = False  # end answers at end tokens, for servers that don't know ignore_eos
    seed: int = 0  # of prompts and times
    device: str = "cpu"  # of MODEL, such as cpu or cuda
    dtype: str = "float32"  # of MODEL's weights: float32, bfloat16, float16, int8, fp8 (GPU)
    serve_flags: str = ""  # further flags of luban serve, such as "--speculative ngram"
    out: Path | None = None  # an HTML page with the table and latency against load
    json: Path | None = None  # the rows as JSON


def _serve(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    about = "Throughput, time to the first token and between tokens of a server, by load."
    args = parse(Arguments, argv, verb="bench serve", about=about, examples=EXAMPLES)
    import shlex

    from luban.core.errors import UsageError
    from luban.serve.bench.local import served

    if bool(args.model) == bool(args.url):
        raise UsageError("luban bench serve takes a MODEL of this machine, or the --url of a server")
    if args.requests < 1 or args.concurrency < 1 or args.shared_tokens < 0:
        raise UsageError("--requests and --concurrency must be at least 1, and --shared-tokens 0 or more")
    rates = [_rate(text) for text in args.rates]
    flags = ["--device", args.device, "--dtype", args.dtype, *shlex.split(args.serve_flags)]
    with nullcontext(args.url or "") if args.url else served(args.model, flags) as url:
        rows = measured(args, url, rates)
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1).replace("Infinity", '"inf"'))
    if args.out is not None:
        from luban import __version__
        from luban.report.serving import serving_page

        about = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Luban {__version__}; " + (
            f"luban bench serve {shlex.join(argv)}"
        )
        args.out.write_text(serving_page(f"Serving {args.model or args.url}", rows, about), encoding="utf-8")


def measured(args: Arguments, url: str, rates: Sequence[float]) -> list[Row]:
    """A row a load, each printed when it is known."""
    import random

    from luban.core.errors import DataError
    from luban.core.log import print_result, warn
    from luban.serve.bench.client import Server
    from luban.serve.bench.measure import send, summary, table
    from luban.serve.bench.workload import Lengths, plan, text_of

    prompts, answers = Lengths.parse(args.prompt_tokens), Lengths.parse(args.answer_tokens)
    extra = {} if args.keep_eos else {"ignore_eos": True}
    server = Server(url, model=args.model_name, api_key=args.api_key, extra=extra)
    per_word = server.tokens_a_word(text_of(random.Random(-1), 20))
    rows: list[Row] = []
    for rate in rates:
        planned = plan(
            args.requests,
            rate,
            prompts,
            answers,
            tokens_a_word=per_word,
            shared_tokens=args.shared_tokens,
            seed=args.seed,
        )
        timed = send(server, planned, args.concurrency)
        rows.append(summary(rate, timed))
        lines = table(rows).splitlines()
        print_result("\n".join([lines[0], lines[-1]] if len(rows) == 1 else lines[-1:]))
        for error in dict.fromkeys(each.error for each in timed if each.error):
            warn(f"requests failed: {error}")
    if not any(row.requests for row in rows):
        raise DataError("no request was answered")
    return rows


def _rate(text: str) -> float:
    """Requests a second. Raises UsageError for what is none."""
    from luban.core.errors import UsageError

    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise UsageError(f"--rates takes requests a second, or inf for all at once; {text!r} given")
    return rate


def run(argv: Sequence[str]) -> int | None:
    """Run the subverb."""
    verbs = {
        "serve": (_serve, "throughput and latency of a server, by load"),
        "collectives": (
            bench_collectives.run,
            "communication between processes: bytes beside formulas, time, bandwidth",
        ),
        "roofline": (bench_roofline.run, "every operation's FLOPs, bytes, bound and time; what fusing buys"),
        "micro-batch": (bench_micro_batch.run, "the number of micro-batches with which a recipe's steps are fastest"),
        "jobs": (bench_jobs.run, "completion times of misconfigured jobs on a shared cluster, in simulation"),
        "machine": (bench_machine.run, "speed of this device by the size of the work, as a table for luban plan"),
    }
    return dispatch("bench", verbs, argv)
