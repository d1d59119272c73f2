"""Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes: Radford et al. 2019, section 2.2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import models, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, bytelevel_tokenizer, require_room, spelled, widened
from luban.tokenizer.cutting import Cutting


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str], cut: Cutting) -> tokenizers.Tokenizer:
    """Learn `vocab_size` tokens: the special ones, the 256 bytes, runs of white space, then merges by frequency.

    Streams over `texts`; memory grows with the number of different words only.
    """
    runs, fixed = [spelled(piece) for piece in cut.white_pieces], len(special) + 256
    require_room(vocab_size, fixed + len(runs), "special tokens, the 256 bytes and runs of white space")
    tokenizer = bytelevel_tokenizer(models.BPE(), cut)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if not runs:
        return tokenizer
    made = bytelevel_tokenizer(widened(tokenizer, fixed, runs, vocab_size), cut)
    made.add_special_tokens(list(special))
    return made
