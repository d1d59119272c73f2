"""`luban export MODEL --out HF_DIR`: a model as transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from luban.core.arguments import parse
from luban.core.log import say

EXAMPLES = """
luban export runs/demo/chat --out exported
luban export runs/a --out exported --dtype bfloat16
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    # a run, a checkpoint or a Hugging Face directory
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: str  # the directory to make
    dtype: str = "float32"  # precision of the weights that are written: float32, bfloat16, float16


def run(argv: Sequence[str]) -> None:
    """Load and write the model."""
    args = parse(Arguments, argv, verb="export", about="Write a model in the Hugging Face layout.", examples=EXAMPLES)
    from luban.load.export import export_model, template_begins_text
    from luban.load.model import open_model

    model = open_model(args.model, dtype=args.dtype)
    out = export_model(model, args.out)
    if template_begins_text(model):
        say(
            "its chat template writes the begin token itself: apply_chat_template(messages, tokenize=True) is right, and a "
            "text that it has filled needs tokenizer(text, add_special_tokens=False), or begins with two"
        )
    architecture = json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    say(f"{args.out}: written as {architecture} in the Hugging Face layout")
