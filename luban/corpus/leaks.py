"""Training documents of one corpus that another corpus holds out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from luban.corpus.conversation import turns
from luban.corpus.document import Document
from luban.corpus.steps.exact import digest
from luban.corpus.words import words


class HeldOut:
    """The contents of held-out documents: `document in held_out` says whether one of them has the same words.

    Words are compared in lower case, without punctuation and white space, so that a corpus built with `normalise` still
    meets one built without it; conversations also by their roles and tool calls. Memory: about 60 bytes a document.
    """

    def __init__(self, documents: Iterable[Document]):
        self._contents = {content_key(document) for document in documents}

    def __contains__(self, document: Document) -> bool:
        return bool(self._contents) and content_key(document) in self._contents

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
