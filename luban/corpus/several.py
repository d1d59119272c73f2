"""Several corpora read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from luban.core.errors import DataError
from luban.core.log import say
from luban.corpus.document import Document
from luban.corpus.leaks import HeldOut
from luban.corpus.reader import read_corpus
from luban.corpus.split import HELDOUT, TRAIN


def read_corpora(corpora: Sequence[Path]) -> dict[str, Iterator[Document]]:
    """The documents of the corpora by split, one corpus behind the other.

    Training documents that another of the corpora holds out (luban.corpus.leaks) are left out; how many is said when the
    training split has been read.

    Raises:
        DataError: a corpus that is named twice.
    """
    if len({path.resolve() for path in corpora}) < len(corpora):
        raise DataError(f"a corpus is named twice: {', '.join(map(str, corpora))}")
    heldout = chain.from_iterable(read_corpus(path, HELDOUT) for path in corpora)
    return {TRAIN: _train(corpora), HELDOUT: heldout}


def _train(corpora: Sequence[Path]) -> Iterator[Document]:
    if len(corpora) == 1:  # whose build kept its splits apart
        yield from read_corpus(corpora[0], TRAIN)
        return
    held_out = HeldOut(document for path in corpora for document in read_corpus(path, HELDOUT))
    for path in corpora:
        left_out = 0
        for document in read_corpus(path, TRAIN):
            if document in held_out:
                left_out += 1
            else:
                yield document
        if left_out:
            say(f"{left_out} training documents of {path} are held out by one of the corpora and are left out")
