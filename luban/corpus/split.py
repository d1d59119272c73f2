"""Which documents are held out: a pure function of seed and document id, whatever else is in the corpus."""

from __future__ import annotations

import re

from luban.core.seeding import derive

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)
PIECE = re.compile(r"(?:~\d+)+$")  # of a document's id: which piece of a document it is


def is_heldout(name: str, fraction: float, seed: int) -> bool:
    """True if the document or unit called `name` is in the held-out fraction (0 to 1).

    The pieces of a document, whose ids are its own with `~0`, `~1`, … behind, fall where the document would.
    """
    return derive(seed, "heldout", document_id(name)) < fraction * 2**63


def document_id(name: str) -> str:
    """The id of the document that `name`, perhaps one of its pieces, belongs to."""
    return PIECE.sub("", name)
