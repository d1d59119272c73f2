"""`luban report DIR…`: one page of pictures from run directories; evaluations compared item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from luban.core.arguments import parse, refuse_flags
from luban.core.errors import UsageError
from luban.core.log import print_result


@dataclass(frozen=True)
class Args:
    """Options."""

    # artifacts, or folders of some; with --attention a model
    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    attention: str | None = None  # a text: show what a model attends to in it
    attention_target: str = ""  # what the decoder of an encoder–decoder reads (empty: what it writes)
    out: Path = Path("report.html")  # the page
    title: str = "A language model, from text to answers"  # its heading


def run(argv: Sequence[str]) -> None:
    """Write the page and print where it is; of evaluations the differences as well."""
    args = parse(
        Args,
        argv,
        verb="report",
        about="One self-contained page of pictures from run directories. Where several of them are evaluations, each is compared "
        "with the first, item by item: differences with intervals of 95% and p-values, on the page and printed. Where a measured model "
        "descends from another, what each stage of training lost and gained is drawn along the lineage.",
        examples="luban report runs/demo --out report.html\nluban report runs/eval-a runs/eval-b\n"
        'luban report smollm2 --attention "The quick brown fox" --out attention.html',
    )
    if args.attention is not None:
        from luban.load.model import load_model
        from luban.report.attention import write_attention

        if len(args.folders) != 1:
            raise UsageError(f"--attention shows one model, {len(args.folders)} given")
        write_attention(load_model(str(args.folders[0])), args.attention, args.out, args.attention_target)
        print_result(args.out)
        return
    refuse_flags(argv, ("attention_target",), "without --attention TEXT, what the encoder reads")
    if not args.folders:
        raise UsageError("luban report takes one folder of an artifact or more (see luban report --help)")
    from luban.report.comparison import compare, lines_of
    from luban.report.gather import find_artifacts
    from luban.report.page import write_report

    write_report(args.folders, args.out, args.title)
    for comparison in compare(
        [f for f in find_artifacts(args.folders, by_age=False) if f.manifest.kind == "evaluation"]
    ):
        print("\n".join(lines_of(comparison)))
    print_result(args.out)
