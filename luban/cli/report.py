"""`luban report DIR…`: one page of pictures from run directories."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from luban.core.arguments import parse
from luban.core.log import print_result


@dataclass(frozen=True)
class Args:
    """Options."""

    folders: Positional[tuple[Path, ...]]  # artifacts, or folders that hold some; with --attention a model
    attention: str = ""  # a text: show what a model attends to in it
    out: Path = Path("report.html")  # the page
    title: str = "A language model, from text to answers"  # its heading


def run(argv: Sequence[str]) -> None:
    """Write the page and print where it is."""
    args = parse(
        Args,
        argv,
        verb="report",
        about="One self-contained page of pictures from run directories.",
        examples="luban report runs/demo --out report.html\nluban report runs/a runs/b\n"
        'luban report smollm2 --attention "The quick brown fox" --out attention.html',
    )
    if args.attention:
        from luban.core.errors import UsageError
        from luban.load.model import load_model
        from luban.report.attention import write_attention

        if len(args.folders) != 1:
            raise UsageError(f"--attention shows one model, {len(args.folders)} given")
        write_attention(load_model(str(args.folders[0])), args.attention, args.out)
        print_result(args.out)
        return
    from luban.report.page import write_report

    write_report(args.folders, args.out, args.title)
    print_result(args.out)
