"""GPT-3's filter against evaluation sets (Brown et al. 2020, appendix C).

A word 13-gram that also stands in an evaluation set is cut out of a training document with 200 characters on
either side; pieces of fewer than 200 characters are discarded; a document cut into more than 10 pieces is dropped
whole. 13-grams found in more than 10 training documents are common phrases, not leaks, and are ignored. Words are
compared in lower case without punctuation; Chinese, Japanese and Korean count by sign.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from luban.core.errors import ConfigError, DataError
from luban.core.hashing import file_sha256
from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import AcrossStep
from luban.corpus.tally import Tally
from luban.corpus.words import ngram_hashes, words

GRAM = 13  # words
WINDOW = 200  # characters cut on either side
SHORTEST = 200  # characters of a piece that is kept
MOST_PIECES = 10  # of a document that is kept
MOST_DOCUMENTS = 10  # that a 13-gram may stand in and still be a leak


class Contamination(AcrossStep):
    """`contamination=FILE+FILE…`: evaluation sets as JSON lines (every string in a line is a text) or plain text.

    Raises:
        ConfigError: no file named.
        DataError: a file that does not exist or holds no text of 13 words.
    """

    def __init__(self, argument: str):
        files = [Path(name) for name in argument.split("+") if name]
        if not files:
            raise ConfigError("the step contamination needs the evaluation sets: contamination=FILE+FILE…")
        grams = [ngram_hashes(words(text).hashes, GRAM) for file in files for text in _texts(file)]
        self.grams = np.unique(np.concatenate([np.zeros(0, np.uint64), *grams]))
        if not len(self.grams):
            raise DataError(f"no text in {', '.join(map(str, files))} has {GRAM} words to look for")
        self.identity = {"step": "contamination", "sets": [[file.name, file_sha256(file)] for file in files]}

    def fingerprint(self, document: Document) -> np.ndarray:
        """(matches,) uint64: the document's 13-grams that an evaluation set has, each once."""
        found = ngram_hashes(words(document.text).hashes, GRAM)
        return np.unique(found[self._known(found)])

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
        pieces = _pieces(document.text, leaks)
        tally.add("contaminated_documents_cut")
        if len(pieces) > MOST_PIECES:
            tally.drop("contamination: many pieces", document)
            return ()
        kept = [piece for piece in pieces if len(piece) >= SHORTEST]
        if not kept:
            tally.drop("contamination: nothing left", document)
        return [replace(document, id=f"{document.id}~{n}", text=piece) for n, piece in enumerate(kept)]

    def _known(self, found: np.ndarray) -> np.ndarray:
        """(n-grams,) bool: whether an evaluation set has them."""
        places = np.minimum(np.searchsorted(self.grams, found), len(self.grams) - 1)
        return self.grams[places] == found


def _pieces(text: str, leaks: np.ndarray) -> list[str]:
    """What stands before, between and behind the leaks and their windows."""
    found = words(text)
    grams = ngram_hashes(found.hashes, GRAM)
    pieces, start = [], 0
    for place in np.flatnonzero(np.isin(grams, leaks)).tolist():
        cut = max(int(found.starts[place]) - WINDOW, 0)
        if cut > start:
            pieces.append(text[start:cut])
        start = max(start, int(found.ends[place + GRAM - 1]) + WINDOW)
    if start < len(text):
        pieces.append(text[start:])
    return pieces


def _texts(file: Path) -> Iterator[str]:
    if not file.is_file():
        raise DataError(f"the evaluation set {file} does not exist")
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8", errors="replace") as lines:
        if ".json" not in "".join(file.suffixes):
            yield lines.read()
            return
        for line in [lines.read()] if file.suffix == ".json" else lines:
            try:
                yield from _strings(json.loads(line))
            except ValueError:
                raise DataError(f"the evaluation set {file} holds a line that is not JSON") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
