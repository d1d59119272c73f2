"""What is done to documents between source and file. A step is `(documents, tally) -> documents`, streaming.

A step decides by the documents alone, in their order, and counts whatever it drops.
"""

from __future__ import annotations

from luban.core.registry import Registry

STEPS = Registry(
    "corpus step",
    {
        "c4": "luban.corpus.steps.c4:c4",
        "gopher": "luban.corpus.steps.gopher:gopher",
        "exact": "luban.corpus.steps.exact:exact",
        "minhash": "luban.corpus.steps.minhash:minhash",
        "personal": "luban.corpus.steps.personal:personal",
    },
)
DEFAULT_STEPS = ("exact",)
