"""Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import models, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, bytelevel_tokenizer, require_room


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    """Learn `vocab_size` tokens: the special ones, the 256 bytes, then merges by frequency.

    Streams over `texts`; memory grows with the number of different words only.
    """
    require_room(vocab_size, len(special) + 256, "special tokens and the 256 bytes")
    tokenizer = bytelevel_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
