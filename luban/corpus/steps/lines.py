"""Line deduplication (CCNet, Wenzek et al. 2020, section 3.1, by line): of lines that repeat, the first stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import AcrossStep, later_repeats
from luban.corpus.tally import Tally

SHORTEST = 20  # characters of a line that may be dropped; shorter ones repeat by chance


class Lines(AcrossStep):
    """Drop lines that stood before in the same or any earlier document: menus, notices, footers.

    Lines are compared in lower case, without spaces at their ends. The decision takes 24 bytes of memory a line.
    """

    def fingerprint(self, document: Document) -> np.ndarray:
        """(lines,) uint64: a hash of each line, 0 for those that always stay."""
        if document.messages is not None:
            return np.zeros(0, np.uint64)
        return np.array([_hash(line) for line in document.text.split("\n")], dtype=np.uint64)

    def decide(self, shards: Sequence[Ragged]) -> Iterator[Ragged]:
        """A flag a line: 1 is drop."""
        return later_repeats(shards)

    def apply(self, document: Document, flags: np.ndarray, tally: Tally) -> Iterable[Document]:
        """The document without its repeated lines, or nothing where no text is left."""
        if not flags.any():
            return (document,)
        kept = [line for line, flag in zip(document.text.split("\n"), flags.tolist(), strict=True) if not flag]
        text = "\n".join(kept)
        tally.add("repeated_lines_removed", int(flags.sum()))
        if not text.strip():
            tally.drop("lines", document)
            return ()
        return (replace(document, text=text),)


def _hash(line: str) -> int:
    line = line.strip().lower()
    if len(line) < SHORTEST:
        return 0
    return int.from_bytes(hashlib.blake2b(line.encode(), digest_size=8).digest(), "little") or 1
