"""`luban corpus build`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from luban.cli.subverbs import dispatch
from luban.core.arguments import parse


@dataclass(frozen=True)
class BuildArgs:
    sources: tyro.conf.Positional[tuple[str, ...]]  # files, folders, globs, KIND:PATH, python:stdlib, python:questions
    out: Path  # directory to make
    heldout: float = 0.05  # fraction kept from training
    seed: int = 0  # of the held-out split
    steps: str = "exact"  # what is done to the documents, in order: names with commas between, or nothing
    workers: int = 1  # processes that share the work; the result is the same for any number
    on: str = "local"  # where they run: local, or ray for a cluster
    bad_share: float = 0.05  # share of unusable records from which the build is refused


def run(argv: Sequence[str]) -> int | None:
    """`luban corpus …`"""
    return dispatch("corpus", {"build": (build, "sources → a clean corpus with a held-out split")}, argv)


def build(argv: Sequence[str]) -> None:
    """`luban corpus build SOURCE… --out DIR`"""
    args = parse(BuildArgs, argv, verb="corpus build",
                 about="Read sources, drop duplicates, hold a part out, and write Parquet files.",
                 examples="luban corpus build notes/ 'books/*.txt' --out corpus\n"
                          "luban corpus build python:stdlib --out corpus --heldout 0.05 --seed 0\n"
                          "luban corpus build 'dumps/*.jsonl' --out corpus --steps c4,gopher,exact,minhash --workers 8")  # fmt: skip
    from luban.core.log import say
    from luban.core.units import bytes_
    from luban.corpus.build import build_corpus

    figures = build_corpus(args.sources, args.out, heldout=args.heldout, seed=args.seed,
                           steps=[name for name in args.steps.split(",") if name], workers=args.workers,
                           on=args.on, bad_share=args.bad_share)  # fmt: skip
    kept = ", ".join(f"{split} {figures[split]['documents']} documents, {bytes_(figures[split]['bytes'])}"
                     for split in ("train", "heldout"))  # fmt: skip
    say(f"corpus {args.out}: {kept}")
    for row in figures["waterfall"]:
        say(f"  {row['step']:<10} {row['documents']} documents, {bytes_(row['bytes'])}")
    for reason, dropped in figures["dropped"].items():
        say(f"  dropped by {reason}: {dropped['documents']} documents, {bytes_(dropped['bytes'])}")
    for what, amount in figures["unusable"].items():
        say(f"  unusable: {amount} {what}, such as {figures['unusable_samples'][what][0]}")
    for what, amount in figures["counts"].items():
        say(f"  {what.replace('_', ' ')}: {amount}")
