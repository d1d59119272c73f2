"""`luban score RM FILE.jsonl --out FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from luban.core.arguments import parse
from luban.core.log import print_result, say

ABOUT = """Score answers with a reward model: every row of FILE.jsonl with a `score` added.

Rows have `prompt` and `completion` (or `chosen`), text or messages; or `messages`. Of a row with `chosen` and `rejected` both are
scored, the latter as `rejected_score`. 0 is the mean score of the preferred answers that the model was measured on."""
EXAMPLES = """
luban score runs/rm answers.jsonl --out scored.jsonl
luban score runs/rm pairs.jsonl --out scored.jsonl --device cuda --dtype bfloat16
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the verb takes."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RM")]  # a run of luban reward
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.jsonl")]  # what is scored
    out: Path  # the file to write
    device: str = "cpu"  # such as cpu or cuda
    dtype: str = "float32"  # precision of the weights: float32, bfloat16, float16


def run(argv: Sequence[str]) -> int:
    args = parse(Arguments, argv, verb="score", about=ABOUT, examples=EXAMPLES)
    from luban.align.scoring import RewardModel, score_file

    count = score_file(RewardModel.load(args.model, args.device, args.dtype), args.file, args.out)
    say(f"{count} rows scored")
    print_result(args.out)
    return 0
