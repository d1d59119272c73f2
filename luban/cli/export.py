"""`luban export MODEL --out HF_DIR`: a model as transformers reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from luban.core.arguments import parse
from luban.core.log import say

if TYPE_CHECKING:
    from luban.load.model import LoadedModel

EXAMPLES = """
luban export runs/demo/chat --out exported
luban export runs/a --out exported --dtype bfloat16
luban export runs/lora --out adapter             # a run of adapters: PEFT's layout
luban export runs/lora --merge --out exported    # a whole model with the adapter in its weights
luban export smollm2 --adapter adapter --merge --out exported
"""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Options."""

    # a run, a checkpoint or a Hugging Face directory
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    out: str  # the directory to make
    adapter: str | None = None  # a run of adapters or a PEFT directory, over MODEL
    merge: bool = False  # write a whole model with the adapter merged into its weights
    dtype: str = "float32"  # precision of the weights that are written: float32, bfloat16, float16


def say_offset(model: LoadedModel) -> None:
    """Of a reward model, how its scores elsewhere differ from those of `luban score`."""
    figures = model.manifest.figures if model.manifest is not None else {}
    if offset := float(figures.get("score_offset", 0.0)):
        say(f"its scores there are those of luban score on {model.name} plus {offset:g}, which the run sets off")


def run(argv: Sequence[str]) -> None:
    """Load and write the model."""
    args = parse(
        Arguments,
        argv,
        verb="export",
        about="Write a model in the Hugging Face layout, an adapter in PEFT's.",
        examples=EXAMPLES,
    )
    from luban.load.adapter_export import export_adapter, merged
    from luban.load.export import export_model, template_begins_text
    from luban.load.model import load_model, open_model
    from luban.models.build import torch_dtype

    if args.adapter is None:
        model = open_model(args.model, dtype="float32" if args.merge else args.dtype)
    else:
        model = load_model(args.model, dtype="float32" if args.merge else args.dtype, adapter=args.adapter)
    if args.merge:
        model = merged(model)
        model.module.to(torch_dtype(args.dtype))
    elif model.adapter is not None:
        export_adapter(model, args.out)
        kept = model.adapter.config.base
        whole = model.adapter.config.at_projections and kept == "float"
        say(f"{args.out}: the adapter in PEFT's layout{'; with --merge, a whole model' if whole else ''}")
        say_offset(model)
        if kept != "float":
            say(
                f"it was trained over weights in {kept}: Luban reads it so, and PEFT should be given a base that is quantised, too"
            )
        return
    out = export_model(model, args.out)
    if template_begins_text(model):
        say(
            "its chat template writes the begin token itself: apply_chat_template(messages, tokenize=True) is right, and a "
            "text that it has filled needs tokenizer(text, add_special_tokens=False), or begins with two"
        )
    say_offset(model)
    architecture = json.loads((out / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    say(f"{args.out}: written as {architecture} in the Hugging Face layout")
