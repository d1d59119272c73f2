"""One token a character, by frequency; a character outside the vocabulary is spelled in UTF-8 bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import tokenizers

from luban.core.errors import ConfigError
from luban.tokenizer.algorithms.bytelevel import require_room
from luban.tokenizer.algorithms.characters import BYTES, frequent, with_fallback
from luban.tokenizer.cutting import DEFAULT, Cutting


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str], cut: Cutting) -> tokenizers.Tokenizer:
    """Learn at most `vocab_size` tokens: the special ones, 256 bytes, then the most frequent characters."""
    if cut != DEFAULT:
        raise ConfigError("digits and white_runs have no meaning for the algorithm char: every character is a token")
    require_room(vocab_size, len(special) + 256, "special tokens and the 256 bytes")
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    return with_fallback([*special, *BYTES, *frequent(counts)][:vocab_size], [], special)
