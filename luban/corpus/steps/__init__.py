"""Corpus steps: transformations and filters of documents.

A step is `(documents, tally) -> documents`, streaming, deciding about each document alone, or an `AcrossStep`,
which compares documents with each other. Both count whatever they drop. On the command line a step is its name,
with `=ARGUMENT` behind it where it takes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

from luban.core.errors import ConfigError
from luban.core.registry import Registry
from luban.corpus.document import Document
from luban.corpus.tally import Tally

Step = Callable[[Iterable[Document], Tally], Iterator[Document]]

STEPS = Registry(
    "corpus step",
    {
        "c4": "luban.corpus.steps.c4:C4",
        "gopher": "luban.corpus.steps.gopher:gopher",
        "exact": "luban.corpus.steps.exact:Exact",
        "minhash": "luban.corpus.steps.minhash:MinHash",
        "personal": "luban.corpus.steps.personal:personal",
        "spans": "luban.corpus.steps.spans:Spans",
        "lines": "luban.corpus.steps.lines:Lines",
        "bloom": "luban.corpus.steps.bloom:Bloom",
        "overlap": "luban.corpus.steps.overlap:Overlap",
        "contamination": "luban.corpus.steps.contamination:Contamination",
        "perplexity": "luban.corpus.steps.quality:Perplexity",
        "classifier": "luban.corpus.steps.quality:Classifier",
        "language": "luban.corpus.steps.language:Language",
        "unicode": "luban.corpus.steps.unicode:unicode",
        "normalise": "luban.corpus.steps.normalise:Normalise",
        "spelling": "luban.corpus.steps.spelling:Spelling",
        "chinese": "luban.corpus.steps.chinese:Chinese",
    },
)
DEFAULT_STEPS = ("exact",)


@lru_cache(maxsize=64)
def make_step(spec: str) -> Any:
    """The step that `NAME` or `NAME=ARGUMENT` means. A class is made with its argument, a function takes none.

    Raises:
        ConfigError: no such step, or an argument where there is none, or none where there must be one.
    """
    name, given, argument = (part.strip() for part in spec.partition("="))
    step = STEPS[name]
    takes = isinstance(step, type) and step.__init__ is not object.__init__
    if given and not takes:
        raise ConfigError(f"the step {name} takes no argument, '{argument}' given")
    if not isinstance(step, type):
        return step
    try:
        return step(argument) if given else step()
    except TypeError:
        raise ConfigError(f"the step {name} needs an argument: {name}=…") from None


def identity(spec: str) -> Any:
    """A step's entry in a corpus's configuration; steps with files give their own."""
    return getattr(make_step(spec), "identity", spec.strip())
