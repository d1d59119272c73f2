"""Verbs of two words: `luban corpus build`, `luban tokenizer train`, …"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from luban.core.errors import UsageError, nearest


def dispatch(
    verb: str, table: Mapping[str, tuple[Callable[[Sequence[str]], int | None], str]], argv: Sequence[str]
) -> int | None:
    """Run the subverb that `argv` begins with; `table` maps its name to (function, what it does).

    Raises:
        UsageError: none or an unknown one is named.
    """
    width = max(map(len, table))
    known = "\n".join(f"  {name:<{width}} {about}" for name, (_, about) in table.items())
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: luban {verb} {'|'.join(table)} …\n\n{known}\n\nluban {verb} {next(iter(table))} --help shows one."
        )
        return 0
    if not argv or argv[0] not in table:
        given = f"unknown '{verb} {argv[0]}'" if argv else f"luban {verb} what?"
        raise UsageError(f"{given}{nearest(argv[0] if argv else '', table)}")
    return table[argv[0]][0](argv[1:])
