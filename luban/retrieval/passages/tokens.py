"""Passages of a fixed number of a tokenizer's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from luban.core.errors import ConfigError
from luban.load.tokenizer import load_tokenizer
from luban.retrieval.packaged import located
from luban.retrieval.passages import PassageRule, Span
from luban.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Tokens(PassageRule):
    """Windows of `length` tokens; special tokens that an encoder adds aren't counted."""

    tokenizer: str = ""  # path of a tokenizer, or of a model that has one, or smollm2 or minilm

    def loaded(self) -> Tokenizer:
        """The tokenizer. Raises ConfigError where none is named, ArtifactError where there is none."""
        if not self.tokenizer:
            raise ConfigError("the passage rule 'tokens' needs a tokenizer: name one by --tokenizer")
        return _load(self.tokenizer)

    def spans(self, text: str) -> Iterator[Span]:
        _, offsets = self.loaded().encode_plain(text)
        for first in range(0, len(offsets), self.length - self.overlap):
            window = offsets[first : first + self.length]
            start, stop = window[0][0], max(end for _, end in window)
            if text[start:stop].strip():
                yield Span(start, stop)
            if first + self.length >= len(offsets):
                break


@lru_cache(maxsize=4)
def _load(path: str) -> Tokenizer:
    return load_tokenizer(located(path, "tokenizer"))
