"""Steps that compare documents with each other, cut so that only the comparison needs one process.

Workers take each document's fingerprint; one process decides over all fingerprints, in document order;
workers apply the decision. The result depends on the documents and their order, never on who worked on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.tally import Tally


class AcrossStep(ABC):
    """A step in three parts; called with documents it does all three in memory."""

    @abstractmethod
    def fingerprint(self, document: Document) -> np.ndarray:
        """(any,) uint64: all that the decision needs to know of a document."""

    @abstractmethod
    def decide(self, shards: Sequence[Ragged]) -> Iterator[Ragged]:
        """From the fingerprints of every shard, in order, the uint8 flags of each shard's documents."""

    @abstractmethod
    def apply(self, document: Document, flags: np.ndarray, tally: Tally) -> Iterable[Document]:
        """The rest of a document, given its flags; dropped text is counted."""

    def __call__(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """The whole step over documents that fit into memory."""
        held = list(documents)
        prints = Ragged.of([self.fingerprint(document) for document in held], np.uint64)
        for flags in self.decide([prints]):
            for document, flag in zip(held, flags, strict=True):
                yield from self.apply(document, flag, tally)


class DropStep(AcrossStep):
    """An AcrossStep whose only decision is to keep a document or to drop it: one flag each, 1 is drop."""

    reason: str  # under which drops are counted

    @abstractmethod
    def duplicates(self, shards: Sequence[Ragged]) -> np.ndarray:
        """(documents of all shards,) bool: which are dropped."""

    def decide(self, shards: Sequence[Ragged]) -> Iterator[Ragged]:
        """One flag a document."""
        dropped, start = self.duplicates(shards).astype(np.uint8), 0
        for shard in shards:
            yield Ragged(dropped[start : start + len(shard)], np.arange(len(shard) + 1, dtype=np.int64))
            start += len(shard)

    def apply(self, document: Document, flags: np.ndarray, tally: Tally) -> Iterable[Document]:
        """The document, or nothing."""
        if flags[0]:
            tally.drop(self.reason, document)
            return ()
        return (document,)


def later_repeats(shards: Sequence[Ragged]) -> Iterator[Ragged]:
    """A flag for each hash: 1 where it stood before, in the same row or any earlier one; 0 is never flagged as a hash."""
    hashes = np.concatenate([shard.values for shard in shards])
    flags = np.ones(len(hashes), dtype=np.uint8)
    flags[np.unique(hashes, return_index=True)[1]] = 0
    flags[hashes == 0] = 0
    start = 0
    for shard in shards:
        yield Ragged(flags[start : start + len(shard.values)], shard.offsets)
        start += len(shard.values)
