"""Counts of a build: documents read, documents dropped by reason, and unreadable records."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from luban.corpus.document import Document
from luban.corpus.jsonable import encodable

SAMPLES = 3  # dropped documents or unusable records kept a reason, for people to judge
SAMPLE_CHARACTERS = 200  # of each


class Tally:
    """Counters of one build, or of a part of it."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.samples: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.changes: dict[str, list[dict[str, str]]] = defaultdict(list)
        self.unusable: Counter[str] = Counter()
        self.unusable_samples: dict[str, list[str]] = defaultdict(list)

    def add(self, what: str, amount: int = 1) -> None:
        """Count `amount` more of `what`."""
        if amount:
            self.counts[what] += amount

    def drop(self, step: str, document: Document) -> None:
        """Count a document that `step` drops, and keep the first few to look at."""
        self.dropped[step].update(documents=1, bytes=document.bytes)
        if len(self.samples[step]) < SAMPLES:
            self.samples[step].append({"id": document.id, "text": document.text[:SAMPLE_CHARACTERS]})

    def show(self, step: str, document: Document, change: str) -> None:
        """Keep the first few changes of a step that people should judge."""
        if len(self.changes[step]) < SAMPLES:
            self.changes[step].append({"id": document.id, "text": change[:SAMPLE_CHARACTERS]})

    def reject(self, what: str, where: str) -> None:
        """Count a record or file that cannot be used, and keep the names of the first few."""
        self.unusable[what] += 1
        if len(self.unusable_samples[what]) < SAMPLES:
            self.unusable_samples[what].append(encodable(where[:SAMPLE_CHARACTERS]))

    def merge(self, data: dict[str, Any]) -> None:
        """Add what a later part of the build counted, as `figures` gave it."""
        self.counts.update(data["counts"])
        self.unusable.update(data["unusable"])
        for step, counts in data["dropped"].items():
            self.dropped[step].update(counts)
        for mine, theirs in (
            (self.samples, data["dropped_samples"]),
            (self.changes, data["changes_samples"]),
            (self.unusable_samples, data["unusable_samples"]),
        ):
            for name, samples in theirs.items():
                mine[name] = (mine[name] + samples)[:SAMPLES]

    def figures(self) -> dict[str, Any]:
        """Everything counted, as plain data."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "dropped": {step: dict(counts) for step, counts in sorted(self.dropped.items())},
            "dropped_samples": dict(sorted(self.samples.items())),
            "changes_samples": dict(sorted(self.changes.items())),
            "unusable": dict(sorted(self.unusable.items())),
            "unusable_samples": dict(sorted(self.unusable_samples.items())),
        }
