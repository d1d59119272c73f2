"""GPT-3's filter against evaluation sets (Brown et al. 2020, appendix C).

A word 13-gram that also stands in an evaluation set is cut out of a training document with 200 characters on
either side; pieces of fewer than 200 characters are discarded; a document cut into more than 10 pieces is dropped
whole. 13-grams found in more than 10 training documents are common phrases, not leaks, and are ignored. Words are
compared in lower case without punctuation; Chinese, Japanese and Korean count by sign.

A text of an evaluation set with 8 to 12 words is looked for whole (the paper shortens its n-grams to 8 words at the
least, for a whole set at a time). Shorter texts, most of them answers and labels, would be found everywhere: they are
not looked for, and how many they are is said and kept in the corpus's configuration.
"""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from luban.core.errors import ConfigError, DataError
from luban.core.hashing import file_sha256
from luban.core.log import warn
from luban.corpus.conversation import turns
from luban.corpus.document import Document
from luban.corpus.evaluation import evaluation_texts
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import AcrossStep
from luban.corpus.tally import Tally
from luban.corpus.words import Runs, ngram_hashes, words

GRAM = 13  # words
FEWEST = 8  # words of a text that is looked for whole
WINDOW = 200  # characters cut on either side
SHORTEST = 200  # characters of a piece that is kept
MOST_PIECES = 10  # of a document that is kept
MOST_DOCUMENTS = 10  # that an n-gram may stand in and still be a leak


class Contamination(AcrossStep):
    """`contamination=FILE+FILE…`: evaluation sets as Parquet, JSON, CSV (every string is a text) or plain text.

    Raises:
        ConfigError: no file named.
        DataError: a file that cannot be read or holds no text of 8 words.
    """

    def __init__(self, argument: str):
        files = [Path(name) for name in argument.split("+") if name]
        if not files:
            raise ConfigError("the step contamination needs the evaluation sets: contamination=FILE+FILE…")
        found: dict[int, list[np.ndarray]] = defaultdict(list)
        texts = short = 0
        for file in files:
            for text in evaluation_texts(file):
                hashes = words(text).hashes
                texts, short = texts + (len(hashes) > 0), short + (0 < len(hashes) < FEWEST)
                if len(hashes) >= FEWEST:
                    size = min(len(hashes), GRAM)
                    found[size].append(ngram_hashes(hashes, size))
        self.grams = {size: np.unique(np.concatenate(rows)) for size, rows in sorted(found.items())}
        names = ", ".join(map(str, files))
        if not self.grams:
            raise DataError(f"no text in {names} has {FEWEST} words to look for")
        if short and multiprocessing.parent_process() is None:
            warn(f"{short} of {texts} texts in {names} have fewer than {FEWEST} words and are not looked for")
        self.identity = {
            "step": "contamination",
            "sets": [[file.name, file_sha256(file)] for file in files],
            "texts": texts,
            "too_short": short,
        }

    def fingerprint(self, document: Document) -> np.ndarray:
        """(matches,) uint64: the document's n-grams that an evaluation set has, each once."""
        text = document.text if document.messages is None else "\n".join(text for _, text in turns(document))
        hashes = words(text).hashes
        found = [
            grams[_known(grams, table)] for size, table in self.grams.items() for grams in [ngram_hashes(hashes, size)]
        ]
        return np.unique(np.concatenate(found))

    def decide(self, shards: Sequence[Ragged]) -> Iterator[Ragged]:
        """A flag a match: 1 is a leak, 0 a phrase that too many documents have."""
        grams, counts = np.unique(np.concatenate([shard.values for shard in shards]), return_counts=True)
        for shard in shards:
            leak = counts[np.searchsorted(grams, shard.values)] <= MOST_DOCUMENTS
            yield Ragged(leak.astype(np.uint8), shard.offsets)

    def apply(self, document: Document, flags: np.ndarray, tally: Tally) -> Iterable[Document]:
        """The document, or its pieces between the leaks (their ids end in `~0`, `~1`, …), or nothing."""
        if not flags.any():
            return (document,)
        if document.messages is not None:
            tally.drop("contamination: conversation", document)
            return ()
        leaks = self.fingerprint(document)[flags.astype(bool)]
        pieces = self._pieces(document.text, leaks)
        tally.add("contaminated_documents_cut")
        if len(pieces) > MOST_PIECES:
            tally.drop("contamination: many pieces", document)
            return ()
        kept = [piece for piece in pieces if len(piece) >= SHORTEST]
        if not kept:
            tally.drop("contamination: nothing left", document)
        return [replace(document, id=f"{document.id}~{n}", text=piece) for n, piece in enumerate(kept)]

    def _pieces(self, text: str, leaks: np.ndarray) -> list[str]:
        """The texts before, between and after the leaks and their windows."""
        found = words(text)
        pieces, start = [], 0
        for first, last in self._places(found, leaks):
            cut = max(first - WINDOW, 0)
            if cut > start:
                pieces.append(text[start:cut])
            start = max(start, last + WINDOW)
        if start < len(text):
            pieces.append(text[start:])
        return pieces

    def _places(self, found: Runs, leaks: np.ndarray) -> list[tuple[int, int]]:
        """(first character, one past the last) of every leak, in order of the first."""
        places = []
        for size in self.grams:
            at = np.flatnonzero(np.isin(ngram_hashes(found.hashes, size), leaks))
            places += zip(found.starts[at].tolist(), found.ends[at + size - 1].tolist(), strict=True)
        return sorted(places)


def _known(found: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(n-grams,) bool: whether the sorted `table` has them."""
    places = np.minimum(np.searchsorted(table, found), len(table) - 1)
    return table[places] == found
