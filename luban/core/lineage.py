"""Refuses artifacts whose ancestry does not fit, and says which two things differ."""

from __future__ import annotations

from collections.abc import Iterator

from luban.core.artifact import Manifest, Parent
from luban.core.errors import LineageError


def ancestors(manifest: Manifest | Parent) -> Iterator[Parent]:
    """Every ancestor, nearest first."""
    queue = list(manifest.parents)
    while queue:
        parent = queue.pop(0)
        yield parent
        queue.extend(parent.parents)


def ancestor(manifest: Manifest | Parent, kind: str) -> Parent | None:
    """The nearest ancestor of this kind."""
    return next((p for p in ancestors(manifest) if p.kind == kind), None)


def require_same(kind: str, left: str, left_hash: str, right: str, right_hash: str, remedy: str) -> None:
    """Raise LineageError unless both sides were made with the same artifact of `kind`.

    Args:
        left, right: the two sides in words, such as "shards data/shards" and "model runs/a".
        remedy: what would be right.
    """
    if left_hash != right_hash:
        raise LineageError(
            f"{left} and {right} were made with different {kind}s ({left_hash[:12]} and {right_hash[:12]}): {remedy}"
        )
