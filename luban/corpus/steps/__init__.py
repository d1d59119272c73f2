"""What is done to documents between source and file. A step is `(documents, tally) -> documents`, streaming.

A step decides by the documents alone, in their order, and counts whatever it drops.
"""

from __future__ import annotations

from luban.core.registry import Registry

STEPS = Registry(
    "corpus step",
    {
        "exact": "luban.corpus.steps.exact:exact",
    },
)
DEFAULT_STEPS = ("exact",)
