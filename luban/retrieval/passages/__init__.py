"""Passage rules: how a document's text is divided into the passages that are indexed and found.

A rule is a small dataclass chosen by name (`--passages sentences`). It returns spans of the document's text, so that a passage
is always `text[start:stop]` and a citation can point into its source.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant


class Span(NamedTuple):
    """A passage inside a document's text."""

    start: int  # first character
    stop: int  # behind the last
    title: str = ""  # of the section that it is in, where the rule knows one


@dataclass(frozen=True, kw_only=True)
class PassageRule(Variant):
    """Base config of how texts are divided. Raises ConfigError where the overlap isn't smaller than the length."""

    registry: ClassVar[Registry] = Registry(
        "passage rule",
        {
            "words": "luban.retrieval.passages.words:Words",
            "sentences": "luban.retrieval.passages.sentences:Sentences",
            "headings": "luban.retrieval.passages.headings:Headings",
            "tokens": "luban.retrieval.passages.tokens:Tokens",
            "document": "luban.retrieval.passages.document:WholeDocument",
        },
    )

    length: int = 100  # of a passage at most, in the rule's units: words (a Chinese character is one) or tokens
    overlap: int = 0  # units at the end of a passage that the next one repeats

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ConfigError(f"length: a passage has at least 1 unit, {self.length} given")
        if not 0 <= self.overlap < self.length:
            raise ConfigError(f"overlap: from 0 to below the length {self.length}, {self.overlap} given")

    def spans(self, text: str) -> Iterator[Span]:
        """The passages of a text, in its order; none of a text without words."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage:
    """A piece of a document, as it is indexed and shown."""

    text: str  # source text from start to stop
    title: str  # of the document or section; may be empty
    source: str  # id of the document
    start: int  # first character in the document's text
    stop: int  # behind the last
    licence: str = ""  # SPDX expression, where known

    @property
    def titled(self) -> str:
        """Title and text as encoders read them."""
        return titled(self.title, self.text)


def titled(title: str, text: str) -> str:
    """A passage as encoders and models read it."""
    return f"{title}\n{text}" if title else text
