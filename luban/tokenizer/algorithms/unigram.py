"""Unigram language-model vocabularies (Kudo 2018), over bytes so that no text is unknown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import models, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, bytelevel_tokenizer, require_room, spelled
from luban.tokenizer.cutting import Cutting

RUN_SCORE = -1e-3  # of a run of white space: near certain, so that one run always beats two shorter ones
STEP = 1e-4  # between the scores that the library gives bytes it has no other score for


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str], cut: Cutting) -> tokenizers.Tokenizer:
    """Learn `vocab_size` tokens: special ones, white runs, then pieces kept by expectation maximisation and pruning."""
    runs = [spelled(piece) for piece in cut.white_pieces]
    require_room(vocab_size, len(special) + 256 + len(runs), "special tokens, the 256 bytes and runs of white space")
    tokenizer = bytelevel_tokenizer(models.Unigram(), cut)
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size - len(runs), special_tokens=list(special), initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]["vocab"][len(special) :]
    pieces = _settle([(piece, score) for piece, score in learned])
    pieces = [*((run, RUN_SCORE) for run in runs), *((piece, score) for piece, score in pieces if piece not in runs)]
    tokenizer.model = models.Unigram([*((token, 0.0) for token in special), *pieces])
    return tokenizer


def _settle(learned: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Take the hash order of the library's tables out of its result.

    It sums in that order, which rounding undoes; and in that order it gives the bytes that no piece kept the scores
    m, m + STEP, m + 2 STEP, … above the lowest score m, so those scores are dealt out again by byte.
    """
    lowest = min(score for _, score in learned)
    steps = {piece: (score - lowest) / STEP for piece, score in learned if len(piece) == 1}
    dealt = sorted(piece for piece, step in steps.items() if step < 256 and abs(step - round(step)) < 1e-6)
    scores = dict(learned)
    scores.update(zip(dealt, sorted((scores[piece] for piece in dealt), reverse=True), strict=True))
    return sorted(
        ((piece, round(score, 9)) for piece, score in scores.items()), key=lambda entry: (-entry[1], entry[0])
    )
