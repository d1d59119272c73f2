"""`luban bench micro-batch`: the number of micro-batches with which a recipe's steps are fastest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from luban.core.arguments import parse_recipe
from luban.core.log import print_result
from luban.core.units import bytes_, milliseconds

if TYPE_CHECKING:
    from luban.train.tune import Trial

ABOUT = """Predict memory and time of a recipe's step for every number of micro-batches, run two steps with the two largest micro-batches
that fit, and name the fastest. The batch stays as it is. Nothing is written."""
EXAMPLES = """
luban bench micro-batch tiny_pretrain_cpu --data.path shards
luban bench micro-batch luban_pretrain_gpu --data.path shards --train.batch_size 512 --json
"""


def run(argv: Sequence[str]) -> int:
    """Predict, measure and print."""
    from luban.cli.training import RECIPES
    from luban.train.recipe import Recipe
    from luban.train.tune import best, tune

    as_json = "--json" in argv
    call = parse_recipe(
        Recipe,
        [*(word for word in argv if word != "--json"), "--dry-run"],
        verb="bench micro-batch",
        about=ABOUT,
        examples=EXAMPLES,
        shipped=RECIPES,
        usage="RECIPE --data.path SHARDS [--json] [--section.field value …]",
    )
    if not as_json:
        print(f"{'micro-batches':>13} {'rows each':>9} {'memory':>9} {'predicted':>11} {'measured':>11}")
    found = tune(call.recipe, say=(lambda trial: None) if as_json else lambda trial: print(_line(trial), flush=True))
    chosen = best(found)
    if as_json:
        print_result(
            json.dumps({"trials": [asdict(trial) for trial in found], "accumulate": chosen.accumulate}, indent=1)
        )
    else:
        print_result(f"--train.accumulate {chosen.accumulate}")
    return 0


def _line(trial: Trial) -> str:
    measured = "out of memory" if not trial.fits else "" if trial.seconds is None else milliseconds(trial.seconds)
    return (
        f"{trial.accumulate:>13} {trial.rows:>9} {bytes_(trial.predicted_bytes):>9} "
        f"{milliseconds(trial.predicted_seconds):>11} {measured:>11}"
    )
