"""C4's deduplication (Raffel et al. 2020, section 2.2): of three-sentence spans that repeat, the first stays."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import AcrossStep, later_repeats
from luban.corpus.tally import Tally
from luban.corpus.words import ngram_hashes

SPAN = 3  # sentences
SENTENCE = re.compile(
    r"[^.!?。！？\n]*(?:[.!?]+(?!\s|[\"”’)]+\s|[\"”’)]*$)[^.!?。！？\n]*)*(?:[.!?。！？]+[\"”’)」』）]*|\n|$)\s*"
)


class Spans(AcrossStep):
    """Cut every sentence that lies in a span of three which stood before, in the same or any earlier document.

    Sentences are compared in lower case with single spaces. The decision takes 24 bytes of memory a sentence.
    """

    def fingerprint(self, document: Document) -> np.ndarray:
        """(spans,) uint64: a hash of each three sentences, in order."""
        if document.messages is not None:
            return np.zeros(0, np.uint64)
        hashes = np.array([_hash(sentence) for sentence in sentences(document.text)], dtype=np.uint64)
        return ngram_hashes(hashes, SPAN)

    def decide(self, shards: Sequence[Ragged]) -> Iterator[Ragged]:
        """A flag a span: 1 is a repetition."""
        return later_repeats(shards)

    def apply(self, document: Document, flags: np.ndarray, tally: Tally) -> Iterable[Document]:
        """The document without its repeated spans, or nothing where no text is left."""
        if not flags.any():
            return (document,)
        kept = [
            sentence
            for number, sentence in enumerate(sentences(document.text))
            if not flags[max(number - SPAN + 1, 0) : number + 1].any()
        ]
        tally.add("sentences_in_repeated_spans_removed", len(flags) + SPAN - 1 - len(kept))
        text = "".join(kept)
        if not text.strip():
            tally.drop("spans", document)
            return ()
        return (replace(document, text=text),)


def sentences(text: str) -> list[str]:
    """The text in sentences, each with the white space behind it: joined, they are the text."""
    return [found for found in SENTENCE.findall(text) if found]


def _hash(sentence: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(" ".join(sentence.lower().split()).encode(), digest_size=8).digest(), "little"
    )
