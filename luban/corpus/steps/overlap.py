"""Books at 90% overlap (LLaMA, Touvron et al. 2023, section 2.1): of two that share so much content, the first stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import DropStep
from luban.corpus.steps.bloom import sampled_ngrams

GRAM = 13  # words
SAMPLE = 8  # one n-gram in so many is looked at, chosen by its hash
FEWEST = 8  # sampled n-grams of a document that can be judged
OVERLAP = 0.9  # of the shorter document's n-grams, found in the longer one
COMMON = 64  # documents that share an n-gram from which it says nothing


class Overlap(DropStep):
    """Drop a document that shares 90% of its content, or of the content of an earlier kept one, with that one.

    Unlike MinHash this sees a text inside a much longer one. Memory: 24 bytes a sampled n-gram.
    """

    reason = "overlap"

    def fingerprint(self, document: Document) -> np.ndarray:
        """(sampled n-grams,) uint64, each once."""
        return sampled_ngrams(document, GRAM, SAMPLE)

    def duplicates(self, shards: Sequence[Ragged]) -> np.ndarray:
        """Pairs of documents that share n-grams are counted, then decided in document order."""
        lengths = np.concatenate([shard.lengths for shard in shards])
        grams = np.concatenate([shard.values for shard in shards])
        owners = np.repeat(np.arange(len(lengths)), lengths)
        dropped = np.zeros(len(lengths), dtype=bool)
        for later, shared in sorted(_shared(grams, owners).items()):
            for earlier, count in shared.items():
                shorter = min(lengths[earlier], lengths[later])
                if not dropped[earlier] and shorter >= FEWEST and count >= OVERLAP * shorter:
                    dropped[later] = True
                    break
        return dropped


def _shared(grams: np.ndarray, owners: np.ndarray) -> dict[int, dict[int, int]]:
    """Later document → earlier document → how many n-grams both have."""
    order = np.argsort(grams, kind="stable")  # within an n-gram, owners stay in order
    ordered, owners = grams[order], owners[order]
    edges = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]])) if len(grams) else grams
    found: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    sizes = np.diff(edges)
    for place in np.flatnonzero((sizes > 1) & (sizes <= COMMON)):
        together = owners[edges[place] : edges[place + 1]].tolist()
        for number, later in enumerate(together):
            for earlier in together[:number]:
                found[later][earlier] += 1
    return found
