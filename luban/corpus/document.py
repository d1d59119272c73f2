"""One document on its way through a corpus build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A text with its name and provenance."""

    id: str  # the same on every machine; unique once the corpus is written (luban.corpus.unique)
    text: str  # the text; of a conversation, its messages' contents joined by line ends
    source: str  # the source's label
    lang: str | None = None  # language code, where known
    quality: float | None = None  # score of a quality step, where one ran
    messages: list[dict[str, str]] | None = None  # a conversation: [{"role", "content"}, …]
    meta: dict[str, Any] | None = None  # whatever the source knows
    split: str | None = None  # "train" or "heldout" where the source decides; else the hash of the id does

    def contents(self) -> Iterator[str]:
        """The texts that a tokenizer will see."""
        if self.messages is None:
            yield self.text
        else:
            yield from (message["content"] for message in self.messages)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())


def conversation_text(messages: list[dict[str, str]]) -> str:
    """The `text` of a conversation's document."""
    return "\n".join(message["content"] for message in messages)
