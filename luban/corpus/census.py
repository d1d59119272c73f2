"""Composition of a corpus: documents and bytes by source, licence and language."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace

from luban.corpus.document import Document
from luban.corpus.licences import parts, spdx

UNKNOWN = "unknown"
KNOWN_LICENCES = dict.fromkeys(
    ("python:stdlib", "python:objects", "python:questions"), "PSF-2.0"
)  # of sources whose terms are known


class Census:
    """Counts documents that are kept. A document's own `licence` in its meta goes before that of its source."""

    def __init__(self, licences: Mapping[str, str] | None = None):
        declared = {source: spdx(name) for source, name in (licences or {}).items()}
        self.declared = {**KNOWN_LICENCES, **declared}  # source → licence; "" is for every other source
        self.counts: dict[str, dict[str, Counter[str]]] = {
            what: defaultdict(Counter) for what in ("sources", "licences", "languages")
        }

    def licensed(self, document: Document) -> Document:
        """The document with its licence, where it is known, in its meta, so that it goes where the document goes."""
        own = (document.meta or {}).get("licence")
        licence = spdx(own) if isinstance(own, str) else self.declared.get(document.source.split("/")[0])
        licence = licence or self.declared.get("")
        if not licence or licence == own:
            return document
        return replace(document, meta={**(document.meta or {}), "licence": licence})

    def add(self, document: Document) -> None:
        """Count one document as `licensed` gave it."""
        source = document.source.split("/")[0]
        own = (document.meta or {}).get("licence")
        licence = own if own and isinstance(own, str) else UNKNOWN
        for what, name in (("sources", source), ("licences", licence), ("languages", document.lang or UNKNOWN)):
            self.counts[what][name].update(documents=1, bytes=document.bytes)

    def figures(self) -> dict[str, dict[str, dict[str, int]]]:
        """Everything counted, as plain data."""
        return {what: {name: dict(c) for name, c in sorted(found.items())} for what, found in self.counts.items()}

    @property
    def terms(self) -> tuple[str, ...]:
        """The licences met, by name; of works to which several apply, each."""
        names = {part for name in self.counts["licences"] for part in parts(name)}
        return tuple(sorted(names - {UNKNOWN}))
