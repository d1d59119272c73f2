"""Which documents are held out: a pure function of seed and document id, whatever else is in the corpus."""

from __future__ import annotations

from luban.core.seeding import derive

TRAIN, HELDOUT = "train", "heldout"
SPLITS = (TRAIN, HELDOUT)


def is_heldout(name: str, fraction: float, seed: int) -> bool:
    """Whether the document or unit called `name` falls into the held-out fraction (0 to 1)."""
    return derive(seed, "heldout", name) < fraction * 2**63
