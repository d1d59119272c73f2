"""Exact deduplication: of documents with the same text, the first stays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

from luban.corpus.document import Document
from luban.corpus.tally import Tally


def exact(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """Drop repeated texts, in whatever splits they are, so that none is both trained on and held out.

    Texts are compared by 128 bits of BLAKE2b; memory grows with the number of different texts, not their size.
    """
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
        if digest in seen:
            tally.drop("exact", document)
            continue
        seen.add(digest)
        yield document
