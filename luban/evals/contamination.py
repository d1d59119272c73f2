"""Which items of a task stand in a corpus, by GPT-3's rule (Brown et al. 2020, appendix C).

An item is contaminated where one of its word n-grams stands in the corpus too: n is the fifth percentile of the items'
lengths in words, at least 8 and at most 13. n-grams found in more than 10 documents are common phrases and are ignored.
Items of fewer words than n can't be decided: their flag is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from luban.core.artifact import MANIFEST
from luban.core.log import progress
from luban.corpus.evaluation import evaluation_texts
from luban.corpus.reader import read_corpus
from luban.corpus.steps.contamination import FEWEST, GRAM, MOST_DOCUMENTS
from luban.corpus.words import ngram_hashes, words

PERCENTILE = 5  # of the items' lengths


def contaminated(items: Sequence[str], documents: Iterable[str]) -> list[bool | None]:
    """One flag an item: whether it shares an n-gram with the documents; None: too short to tell."""
    hashes = [words(text).hashes for text in items]
    lengths = [len(each) for each in hashes]
    size = int(np.clip(np.percentile(lengths, PERCENTILE), FEWEST, GRAM)) if lengths else GRAM
    grams = [np.unique(ngram_hashes(each, size)) if len(each) >= size else None for each in hashes]
    wanted = [each for each in grams if each is not None]
    if not wanted:
        return [None] * len(items)
    table = np.unique(np.concatenate(wanted))
    counts = np.zeros(len(table), dtype=np.int64)
    for document in documents:
        found = np.unique(ngram_hashes(words(document).hashes, size))
        places = np.minimum(np.searchsorted(table, found), len(table) - 1)
        counts[places[table[places] == found]] += 1
    leaked = (counts > 0) & (counts <= MOST_DOCUMENTS)
    return [None if each is None else bool(leaked[np.searchsorted(table, each)].any()) for each in grams]


def texts_of(paths: Sequence[Path]) -> Iterable[str]:
    """The documents of corpora (their training split) and of files (Parquet, JSON, CSV, plain text).

    Raises ArtifactError or DataError for a path that is neither.
    """
    for path in paths:
        with progress(f"contamination: {path.name}", 0, "documents") as bar:
            if (path / MANIFEST).is_file():
                for document in read_corpus(path):
                    yield "\n".join(document.contents())
                    bar.advance(1)
            else:
                for text in evaluation_texts(path):
                    yield text
                    bar.advance(1)
