"""Shared code of character-level algorithms: characters outside the vocabulary are encoded as UTF-8 bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def frequent(counts: Counter[str]) -> list[str]:
    """The characters counted, most frequent first, ties by code point."""
    return sorted(counts, key=lambda character: (-counts[character], character))


def with_fallback(
    vocabulary: Sequence[str], merges: list[tuple[str, str]], special: Sequence[str], *, ignore_merges: bool = False
) -> tokenizers.Tokenizer:
    """A tokenizer of characters and merges that spells in bytes what it lacks."""
    ids = {token: i for i, token in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(models.BPE(ids, merges, byte_fallback=True, ignore_merges=ignore_merges))
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(list(special))
    return made
