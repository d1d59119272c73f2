"""`luban systems`: the ledger, with the evidence for each row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from luban.core.arguments import parse
from luban.core.ledger import GROUPS, System, load_ledger

MARKS = {"works": "✓", "in part": "◐", "not yet": "·"}


@dataclass(frozen=True)
class Args:
    """Options."""

    group: Literal["A", "B", "C", "D", "E", "F", "G", "H", "I", "J"] | None = None  # one group's rows only
    working: bool = False  # only rows that work, wholly or in part
    json: bool = False  # machine-readable


def run(argv: Sequence[str]) -> None:
    """Print the ledger."""
    args = parse(
        Args,
        argv,
        verb="systems",
        about="Every system Luban is built to hold, and the evidence for each.",
        examples="luban systems\nluban systems --group C\nluban systems --working --json",
    )
    rows = [s for s in load_ledger() if args.group in (None, s.id[0]) and not (args.working and s.status == "not yet")]
    if args.json:
        print(json.dumps([{**asdict(s), "status": s.status} for s in rows], indent=2, ensure_ascii=False))
        return
    group = ""
    for row in rows:
        if row.id[0] != group:
            group = row.id[0]
            print(f"\n{group}. {GROUPS[group]}")
        print(_line(row))
    tally = Counter(row.status for row in rows)
    print("\nworks: usable, and its test proves it right; the paper's effect is shown only where a figure is measured")
    print(f"{len(rows)} rows: " + ", ".join(f"{tally[s]} {s} {MARKS[s]}" for s in MARKS if tally[s]))


def _line(row: System) -> str:
    text = f"  {MARKS[row.status]} {row.id:<4} {row.name}" + (f" ({row.paper})" if row.paper else "")
    details = [
        row.module,
        row.test,
        row.command and f"$ {row.command}",
        row.measured and f"measured {row.measured} [{row.hardware}]",
        row.published and f"published {row.published}",
        row.missing and f"missing: {row.missing}",
    ]
    return "\n         ".join([text, *filter(None, details)])
