"""What a build counts: every document that came in, was dropped, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

from luban.corpus.document import Document

SAMPLES = 3  # dropped documents kept a reason, for people to judge
SAMPLE_CHARACTERS = 200  # of each


class Tally:
    """Counters of one build."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = defaultdict(Counter)
        self.samples: dict[str, list[dict[str, str]]] = defaultdict(list)

    def add(self, what: str, amount: int = 1) -> None:
        """Count `amount` more of `what`."""
        self.counts[what] += amount

    def drop(self, step: str, document: Document) -> None:
        """Count a document that `step` drops, and keep the first few to look at."""
        self.dropped[step].update(documents=1, bytes=document.bytes)
        if len(self.samples[step]) < SAMPLES:
            self.samples[step].append({"id": document.id, "text": document.text[:SAMPLE_CHARACTERS]})

    def figures(self) -> dict[str, Any]:
        """Everything counted, as plain data."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "dropped": {step: dict(counts) for step, counts in self.dropped.items()},
            "dropped_samples": dict(self.samples),
        }
