"""Whole documents as passages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from luban.retrieval.passages import PassageRule, Span


@dataclass(frozen=True, kw_only=True)
class WholeDocument(PassageRule):
    """Each document is one passage, whatever its length: for texts that are paragraphs already.

    `length` and `overlap` mean nothing here.
    """

    def spans(self, text: str) -> Iterator[Span]:
        stripped = text.strip()
        if any(character.isalnum() for character in stripped):
            start = len(text) - len(text.lstrip())
            yield Span(start, start + len(stripped))
