"""WordPiece (Schuster and Nakajima 2012; greedy longest match as in BERT), over bytes so that no text is unknown.

Departures from BERT: words are spelled in bytes, and a piece inside a word is marked by a character that
no byte is spelled with (BERT's `##` could be text), so that decoding is exact. Words of more than 32 characters, or of 12
in scripts without spaces, are cut: the search for the longest piece takes time in the cube of a word's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, by_id, bytelevel_tokenizer, require_room, spelled
from luban.tokenizer.cutting import Cutting

INSIDE = "\u203f"  # undertie: marks a piece that continues a word
LONGEST = 32  # characters of a word
UNSPACED, LONGEST_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}", 12
LONGEST_WORD = 10_000  # bytes; above what comes of LONGEST and of white space, since a longer word would be unknown


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str], cut: Cutting) -> tokenizers.Tokenizer:
    """Learn `vocab_size` tokens: special ones, 256 bytes at the start of and inside words, white runs, then pieces."""
    runs = [spelled(piece) for piece in cut.white_pieces]
    needed = len(special) + 512 + len(runs)
    require_room(vocab_size, needed, "special tokens, two forms of the 256 bytes and runs of white space")
    # Naming the bytes' two forms here fixes their ids, and with them how the trainer breaks ties.
    fixed = [*special, *ALPHABET, *(INSIDE + byte for byte in ALPHABET), *runs]
    learner = _words(models.WordPiece(unk_token=special[0], continuing_subword_prefix=INSIDE), cut)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=fixed, continuing_subword_prefix=INSIDE, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    return _with_vocabulary(by_id(learner), special, cut)


def _with_vocabulary(pieces: list[str], special: Sequence[str], cut: Cutting) -> tokenizers.Tokenizer:
    model = models.WordPiece(
        {piece: i for i, piece in enumerate(pieces)},
        unk_token=special[0],
        max_input_chars_per_word=LONGEST_WORD,
        continuing_subword_prefix=INSIDE,
    )
    tokenizer = _words(model, cut)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(f"^{INSIDE}"), ""), decoders.ByteLevel()])
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def _words(model: models.WordPiece, cut: Cutting) -> tokenizers.Tokenizer:
    """A tokenizer over bytes whose words have at most LONGEST characters."""
    tokenizer = bytelevel_tokenizer(model, cut)
    white = max(LONGEST, cut.white_runs)
    short = Regex(rf"\s?[{UNSPACED}]{{1,{LONGEST_UNSPACED}}}|\s?\S{{1,{LONGEST}}}[\r\n]{{0,{LONGEST}}}|\s{{1,{white}}}")
    *splits, spell = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.Split(short, behavior="isolated"), spell]
    )
    return tokenizer
