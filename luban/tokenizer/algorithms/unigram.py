"""Unigram language-model vocabularies (Kudo 2018), over bytes so that no text is unknown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import models, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, bytelevel_tokenizer, require_room


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    """Learn `vocab_size` tokens: the special ones, then pieces kept by expectation maximisation and pruning."""
    require_room(vocab_size, len(special) + 256, "special tokens and the 256 bytes")
    tokenizer = bytelevel_tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"][len(special) :]
    pieces = _settle([(piece, score) for piece, score in learned])
    tokenizer.model = models.Unigram([*((token, 0.0) for token in special), *pieces])
    return tokenizer


def _settle(learned: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Take the hash order of the library's tables out of its result.

    It sums in that order, which rounding undoes; and it gives bytes that it never met the scores below all
    others in that order, so those scores are dealt out again by byte.
    """
    floor = min((score for piece, score in learned if len(piece) > 1), default=0.0)
    unmet = sorted(piece for piece, score in learned if len(piece) == 1 and score < floor)
    below = sorted((score for piece, score in learned if len(piece) == 1 and score < floor), reverse=True)
    scores = {**dict(learned), **dict(zip(unmet, below, strict=True))}
    return sorted(
        ((piece, round(score, 9)) for piece, score in scores.items()), key=lambda entry: (-entry[1], entry[0])
    )
