"""A tokenizer report as tables in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from luban.core.units import bytes_, count
from luban.tokenizer.report import Fit, Report

LONGEST, UNUSED = 12, 24  # tokens shown
GROUPS = 16  # rows of a table
CUT = 32  # characters of a token


def show(report: Report, label: str, beside: Sequence[str], console: Console) -> None:
    """Print the whole report."""
    total = report.total
    head = Text.assemble(
        (f"{total.bytes_per_token:.3f}", "bold cyan"),
        " bytes a token    ",
        (f"{total.fertility:.3f}", "bold cyan"),
        " tokens a word    ",
        (f"{total.used:.1%}", "bold cyan"),
        f" of {report.tokenizer.vocab_size:,} tokens used    ",
        f"{bytes_(total.bytes)}, {count(total.tokens)} tokens",
    )
    console.print(Panel(head, title=f"tokenizer {label}", title_align="left", border_style="dim", expand=False))
    for title, fits in (("text", report.names), ("language", report.languages), ("domain", report.domains)):
        if title == "text" or len(fits) > 1 or set(fits) != {"unknown"}:
            console.print(_table(title, fits, beside), end="\n\n")
    if beside:
        console.print(
            Text(
                "Beside: bytes a token of the other vocabulary, and its tokens for each of ours "
                "(above 1.00, ours is shorter).",
                style="dim",
            ),
            end="\n\n",
        )
    console.print(_vocabulary(report))


def _table(title: str, fits: dict[str, Fit], beside: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(title, overflow="fold", max_width=40)
    for name in ("size", "words", "tokens", "bytes/token", "tokens/word", "used", *beside):
        table.add_column(name, justify="right", no_wrap=True)
    ordered = sorted(fits.items(), key=lambda entry: (-entry[1].bytes, entry[0]))
    best = max(fit.bytes_per_token for fit in fits.values())
    for name, fit in ordered[:GROUPS]:
        style = "green" if fit.bytes_per_token == best and len(fits) > 1 else ""
        others = [_other(fit, other) for other in beside]
        table.add_row(
            name,
            bytes_(fit.bytes),
            count(fit.words),
            count(fit.tokens),
            Text(f"{fit.bytes_per_token:.3f}", style=style),
            f"{fit.fertility:.3f}",
            f"{fit.used:.1%}",
            *others,
        )
    if len(ordered) > GROUPS:
        table.add_row(Text(f"… and {len(ordered) - GROUPS} more", style="dim"))
    return table


def _other(fit: Fit, name: str) -> Text:
    ratio = fit.against(name)
    told = f"{fit.bytes / max(fit.beside[name], 1):.3f}"
    return Text.assemble(told, (f" ×{ratio:.2f}", "green" if ratio >= 1 else "red"))


def _shown(piece: str) -> str:
    """A token as people can read it: a run as `' '×64`, any other long one cut."""
    if len(piece) > 3 and len(set(piece)) == 1:
        return f"{piece[0]!r}×{len(piece)}"
    return repr(piece if len(piece) <= CUT else piece[:CUT] + "…")


def _vocabulary(report: Report) -> Group:
    unused = report.unused()
    learned = report.tokenizer.vocab_size - len(report.tokenizer.special)
    spelled = [_shown(report.tokenizer.decode([i])) for i in unused[:UNUSED]]
    return Group(
        Text.assemble(("longest tokens  ", "bold"), "  ".join(map(_shown, report.longest(LONGEST)))),
        Text.assemble(
            ("unused tokens   ", "bold"),
            f"{len(unused):,} of {learned:,}  ",
            ("  ".join(spelled) + (" …" if len(unused) > UNUSED else ""), "dim"),
        ),
    )
