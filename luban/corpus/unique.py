"""Ids that are unique in their corpus, even where a source gives the same one to several documents."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from luban.corpus.document import Document

BATCH = 1 << 20  # ids kept in a set before they are moved to a sorted array


class UniqueIds:
    """Passes documents on in order; a document whose id was given before gets `#2`, `#3`, … behind it.

    Memory: about 8 bytes a document, as 64-bit hashes of the ids, beside a set of at most BATCH of them. Two of 100 million
    different ids share a hash with probability 0.0003; one of them is then renamed, too.
    """

    def __init__(self) -> None:
        self.renamed = 0  # documents
        self._recent: set[int] = set()
        self._sorted = np.zeros(0, dtype=np.uint64)

    def __call__(self, document: Document) -> Document:
        """The document, renamed where its id is taken."""
        name, number = document.id, 1
        while not self._take(name):
            number += 1
            name = f"{document.id}#{number}"
        if number == 1:
            return document
        self.renamed += 1
        return replace(document, id=name)

    def _take(self, name: str) -> bool:
        """Reserve the name. True if it was free."""
        key = int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        place = int(np.searchsorted(self._sorted, np.uint64(key)))
        if key in self._recent or (place < len(self._sorted) and int(self._sorted[place]) == key):
            return False
        self._recent.add(key)
        if len(self._recent) >= BATCH:
            fresh = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, fresh]))
            self._recent = set()
        return True
