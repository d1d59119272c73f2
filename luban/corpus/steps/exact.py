"""Exact deduplication: of documents with the same text, and of conversations with the same messages, the first stays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from luban.corpus.conversation import turns
from luban.corpus.document import Document
from luban.corpus.ragged import Ragged
from luban.corpus.steps.across import DropStep


class Exact(DropStep):
    """Drop repeated texts, in whatever splits they are, so that none is both trained on and held out.

    Conversations are the same where roles, contents, names and tool calls are. Texts are compared by 128 bits of BLAKE2b; the decision takes 33 bytes of memory a document.
    """

    reason = "exact"

    def fingerprint(self, document: Document) -> np.ndarray:
        """(2,) uint64."""
        return np.frombuffer(digest(document), dtype=np.uint64)

    def duplicates(self, shards: Sequence[Ragged]) -> np.ndarray:
        """Sorted by digest, stably, a document repeats the one before it or is the first of its kind."""
        digests = np.concatenate([shard.values for shard in shards]).reshape(-1, 2)
        order = np.lexsort((digests[:, 0], digests[:, 1]))
        ordered = digests[order]
        repeated = np.zeros(len(digests), dtype=bool)
        repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
        return repeated


def digest(document: Document) -> bytes:
    """(16 bytes) The same for two documents where their texts are, or their conversations."""
    if document.messages is None:
        return hashlib.blake2b(document.text.encode(), digest_size=16).digest()
    return hashlib.blake2b(json.dumps(turns(document)).encode(), digest_size=16, person=b"messages").digest()
