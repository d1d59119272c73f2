"""WordPiece (Schuster and Nakajima 2012; greedy longest match as in BERT), over bytes so that no text is unknown.

Departures from BERT: words are spelled in bytes, and a piece inside a word is marked by a character that
no byte is spelled with (BERT's `##` could be text), so that decoding is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, bytelevel_tokenizer, require_room

INSIDE = "\u203f"  # undertie: marks a piece that continues a word
LONGEST_WORD = 10_000  # bytes; above what WORDS lets through, since a longer word would be unknown


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    """Learn `vocab_size` tokens: the special ones, 256 bytes at the start of and inside words, then pieces."""
    require_room(vocab_size, len(special) + 512, "special tokens and two forms of the 256 bytes")
    # Naming the bytes' two forms here fixes their ids, and with them how the trainer breaks ties.
    fixed = [*special, *ALPHABET, *(INSIDE + byte for byte in ALPHABET)]
    learner = bytelevel_tokenizer(models.WordPiece(unk_token=special[0], continuing_subword_prefix=INSIDE))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, continuing_subword_prefix=INSIDE, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    ids = learner.get_vocab()
    return _with_vocabulary(sorted(ids, key=ids.__getitem__), special)


def _with_vocabulary(pieces: list[str], special: Sequence[str]) -> tokenizers.Tokenizer:
    model = models.WordPiece(
        {piece: i for i, piece in enumerate(pieces)},
        unk_token=special[0],
        max_input_chars_per_word=LONGEST_WORD,
        continuing_subword_prefix=INSIDE,
    )
    tokenizer = bytelevel_tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{INSIDE}"), ""), decoders.ByteLevel()])
    tokenizer.add_special_tokens(list(special))
    return tokenizer
