"""`luban demo`: the whole life, on text this machine already has."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from luban.core.arguments import parse


@dataclass(frozen=True)
class Args:
    """Options."""

    out: Path = Path("runs/demo")  # where everything goes; an unfinished demo goes on
    seed: int = 0  # of the split, the weights and the order of the data


def run(argv: Sequence[str]) -> None:
    """Run the demo, then serve the model (DEMO_SERVE=0, or no terminal: answer three questions)."""
    args = parse(
        Args,
        argv,
        verb="demo",
        about="The whole life: corpus, tokenizer, shards, pretraining, tuning, evaluation, report, chat page.",
        examples="luban demo\nDEMO_SERVE=0 luban demo --out runs/mine",
    )
    from luban.demo.run import demo

    demo(args.out, args.seed, serve=os.environ.get("DEMO_SERVE") != "0" and sys.stdin.isatty())
