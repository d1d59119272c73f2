"""`luban import HF_DIR --out DIR`: a foreign model as a checkpoint of Luban's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from luban.core.arguments import parse
from luban.core.log import say

EXAMPLES = """
luban import ~/models/TinyLlama --out models/tinyllama
luban import ~/models/TinyLlama --out models/tinyllama --dtype bfloat16
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    # a Hugging Face directory with config.json and safetensors
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="HF_DIR")]
    out: str  # the directory to make
    dtype: str = "float32"  # precision of the weights that are written: float32, bfloat16, float16


def run(argv: Sequence[str]) -> None:
    """Read, check and write the model."""
    args = parse(Arguments, argv, verb="import", about="Bring a Hugging Face model in.", examples=EXAMPLES)
    from luban.core.units import count
    from luban.load.export import import_model
    from luban.load.model import load_model

    model = load_model(args.source, dtype=args.dtype)
    import_model(model, args.out)
    say(f"{args.out}: {count(model.spec.parameters)} parameters, {args.dtype}, context {model.spec.context}")
