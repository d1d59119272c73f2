"""What `make test` says at its end: what each skipped test would have needed, grouped."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

ELSEWHERE = ("runs directly", "run under TRITON_INTERPRET=1")  # the same test runs in another process


def lines(skipped: Iterable[tuple[str, str]]) -> list[str]:
    """One line a want, the most wanted first: `a CUDA GPU: 31 tests (tests/gpu/test_attention.py, …)`.

    Args:
        skipped: (node id, pytest's reason) of each skipped test, or of a file that was skipped whole.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for node, reason in skipped:
        if not reason.removeprefix("Skipped: ").startswith(ELSEWHERE):
            groups[_want(reason)].append(node)
    found = []
    for want, nodes in sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])):
        tests = sum("::" in node for node in nodes)
        whole = len(nodes) - tests
        counts = [f"{n} {name}{'s' * (n != 1)}" for n, name in ((tests, "test"), (whole, "whole file")) if n]
        files = sorted({node.partition("::")[0] for node in nodes})
        found.append(f"{want}: {' and '.join(counts)} ({', '.join(files[:3])}{', …' * (len(files) > 3)})")
    return found


def _want(reason: str) -> str:
    """The thing that is missing, out of a reason such as "could not import 'ray': No module named 'ray'"."""
    reason = reason.removeprefix("Skipped: ")
    if package := re.match(r"could not import '([\w.]+)'", reason):
        return f"the package {package[1].partition('.')[0]}"
    if package := re.search(r"the package ([\w-]+), which isn't installed", reason):
        return f"the package {package[1]}"
    if needed := re.match(r"needs (.+)", reason):
        return needed[1]
    if missing := re.match(r"(.+?) (?:is|are) not (?:installed|in this torch)$", reason):
        return missing[1]
    return reason
