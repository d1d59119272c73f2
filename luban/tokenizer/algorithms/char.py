"""One token a character, by frequency; a character outside the vocabulary is spelled in UTF-8 bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models

from luban.tokenizer.algorithms.bytelevel import require_room

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    """Learn at most `vocab_size` tokens: the special ones, 256 bytes, then the most frequent characters."""
    require_room(vocab_size, len(special) + 256, "special tokens and the 256 bytes")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    frequent = sorted(counts, key=lambda character: (-counts[character], character))
    vocabulary = [*special, *BYTES, *frequent][:vocab_size]
    model = models.BPE({token: i for i, token in enumerate(vocabulary)}, [], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(special))
    return tokenizer
