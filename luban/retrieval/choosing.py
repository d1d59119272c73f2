"""Which retriever an index gets where none is named: hybrid where an installed encoder declares the texts' language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from luban.core.errors import MissingExtra
from luban.corpus.languages import is_determined, matches
from luban.corpus.steps.language import identify
from luban.retrieval.documents import DocumentReader
from luban.retrieval.index import Retriever
from luban.retrieval.packaged import PACKAGED, card_languages, packaged_folder

SAMPLE = 200  # documents whose language is looked at
PREVAILING = 0.9  # share of them that must be in one of the encoder's languages


def choose(
    paths: Sequence[str], licences: Mapping[str, str] | None = None, text_field: str = "text"
) -> tuple[Retriever, str | None]:
    """(retriever, encoder) for the texts below some paths.

    Hybrid is better than BM25 where the encoder knows the language and far worse where it doesn't, so an unknown or undeclared
    language means BM25.
    """
    installed = {name: folder for name in PACKAGED if (folder := packaged_folder(name)) is not None}
    declared = {name: card_languages(folder) for name, folder in installed.items()}
    if not any(declared.values()):
        return "bm25", None
    found = Counter(languages(DocumentReader(paths, licences, text_field)))
    for name, codes in declared.items():
        covered = sum(count for lang, count in found.items() if any(matches(lang, code) for code in codes))
        if found and covered >= PREVAILING * found.total():
            return "hybrid", name
    return "bm25", None


def languages(reader: DocumentReader) -> Iterator[str]:
    """The languages of the first documents, as their source declares them or as they are identified; "" for unknown."""
    for number, document in enumerate(reader):
        if number == SAMPLE:
            return
        if document.lang is not None and is_determined(document.lang):
            yield document.lang
            continue
        try:
            yield identify(document.text) or ""
        except MissingExtra:
            yield ""
