"""What a corpus is made of: documents and bytes by source, licence and language."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

from luban.corpus.document import Document

UNKNOWN = "unknown"
KNOWN_LICENCES = {"python:stdlib": "PSF-2.0", "python:questions": "PSF-2.0"}  # of sources whose terms are known


class Census:
    """Counts documents that are kept. A document's own `licence` in its meta goes before that of its source."""

    def __init__(self, licences: Mapping[str, str] | None = None):
        self.declared = {**KNOWN_LICENCES, **(licences or {})}  # source → licence; "" is for every other source
        self.counts: dict[str, dict[str, Counter[str]]] = {
            what: defaultdict(Counter) for what in ("sources", "licences", "languages")
        }

    def add(self, document: Document) -> None:
        """Count one document."""
        source = document.source.split("/")[0]
        licence = (document.meta or {}).get("licence") or self.declared.get(source) or self.declared.get("", UNKNOWN)
        for what, name in (("sources", source), ("licences", licence), ("languages", document.lang or UNKNOWN)):
            self.counts[what][name].update(documents=1, bytes=document.bytes)

    def figures(self) -> dict[str, dict[str, dict[str, int]]]:
        """Everything counted, as plain data."""
        return {what: {name: dict(c) for name, c in sorted(found.items())} for what, found in self.counts.items()}

    @property
    def terms(self) -> tuple[str, ...]:
        """The licences met, by name."""
        return tuple(sorted(name for name in self.counts["licences"] if name != UNKNOWN))
