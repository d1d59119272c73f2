"""Licences as lineage: what an artifact is made from decides what may be done with it."""

from __future__ import annotations

from collections.abc import Iterator

from luban.core.artifact import Manifest, Parent
from luban.core.errors import LineageError

# Licences that forbid passing on what was made from their works, and the words for it. Names are SPDX identifiers
# where there are such; a name that is not here forbids nothing that Luban knows of.
FORBID_EXPORT = {
    "CC-BY-ND-4.0": "allows no derivatives",
    "CC-BY-NC-ND-4.0": "allows no derivatives",
    "research-only": "allows research use only",
    "proprietary": "allows no redistribution",
    "no-export": "was marked as not to be exported",
}


def inherited_terms(manifest: Manifest | Parent) -> dict[str, list[str]]:
    """Every licence that binds an artifact → the names of the ancestors (itself as `this one`) it comes from."""
    found: dict[str, list[str]] = {}
    for name, terms in _named(manifest):
        for term in terms:
            names = found.setdefault(term, [])
            if name not in names:
                names.append(name)
    return dict(sorted(found.items()))


def _named(manifest: Manifest | Parent) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "this one", manifest.terms
    queue = list(manifest.parents)
    while queue:
        parent = queue.pop(0)
        yield f"the {parent.kind} {parent.name}", parent.terms
        queue.extend(parent.parents)


def require_exportable(manifest: Manifest | Parent, name: str) -> None:
    """Raise LineageError naming the ancestor and its licence where one forbids passing `name` on."""
    for term, owners in inherited_terms(manifest).items():
        choices = term.split(" OR ")  # licences of which the user may choose one
        if all(choice in FORBID_EXPORT for choice in choices):
            raise LineageError(
                f"{name} must not be exported: {owners[-1]}, which it was made from, is under {term}, "
                f"which {FORBID_EXPORT[choices[0]]}"
            )
