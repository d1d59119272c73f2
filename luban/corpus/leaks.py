"""Training documents of one corpus that another corpus holds out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from luban.corpus.conversation import turns
from luban.corpus.document import Document
from luban.corpus.split import document_id
from luban.corpus.steps.exact import digest
from luban.corpus.steps.minhash import shingles
from luban.corpus.words import words

SKETCH = 32  # word 5-grams of a held-out document by which another version of it is known


class HeldOut:
    """Held-out documents: `document in held_out` says whether one of them is the same document, perhaps treated otherwise.

    The same are documents with the same words (in lower case, without punctuation and white space; of conversations also
    with the same roles and tool calls), and documents of the same id of which a word 5-gram among 32 chosen by their hash
    agrees: what other steps left of a document, or a piece of it. A piece with a tenth of a document's words is missed
    with probability 0.03. Memory: about 500 bytes a document.
    """

    def __init__(self, documents: Iterable[Document]):
        self._contents: set[int] = set()
        self._sketches: dict[int, list[np.ndarray]] = defaultdict(list)  # by a hash of the id
        for document in documents:
            self._contents.add(content_key(document))
            self._sketches[_id_key(document)].append(np.unique(shingles(document))[:SKETCH])

    def __contains__(self, document: Document) -> bool:
        if not self._contents:
            return False
        if content_key(document) in self._contents:
            return True
        sketches = self._sketches.get(_id_key(document))
        return sketches is not None and bool(np.isin(np.concatenate(sketches), shingles(document)).any())

    def __len__(self) -> int:
        return len(self._contents)


def content_key(document: Document) -> int:
    """64 bits that are the same for two documents with the same words; those without words are compared as they are."""
    told = [(role, words(text).hashes.tobytes()) for role, text in turns(document)]
    if not any(hashes for _, hashes in told):
        return int.from_bytes(digest(document)[:8], "little")
    state = hashlib.blake2b(digest_size=8)
    for role, hashes in told:
        state.update(f"{role}:{len(hashes)}:".encode())
        state.update(hashes)
    return int.from_bytes(state.digest(), "little")


def _id_key(document: Document) -> int:
    """64 bits of the id, the same for a document and its pieces."""
    name = document_id(document.id).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
