"""Byte-pair encoding over characters with byte fallback, as LLaMA's (Touvron et al. 2023, section 2.1).

Departures from SentencePiece: spaces stay spaces (its `▁` could be text), no space is prepended to the text, and words
are split by `Cutting` first, so that decoding is exact.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from luban.tokenizer.algorithms.bytelevel import by_id, merges, require_room
from luban.tokenizer.algorithms.characters import BYTES, frequent, with_fallback
from luban.tokenizer.cutting import Cutting

# max share of the vocabulary after special tokens and bytes that single characters may take
SHARE = 0.5
# noncharacter U+FFFF; replaces characters outside the alphabet so that no merge spans them
BREAK = "\uffff"


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str], cut: Cutting) -> tokenizers.Tokenizer:
    """Learn at most `vocab_size` tokens: special ones, 256 bytes, runs of white space, the most
    frequent characters, merges.

    The texts are kept in a temporary file, since the characters must be known before pairs are counted.
    """
    head = [*special, *BYTES, *cut.white_pieces]
    require_room(vocab_size, len(head), "special tokens, the 256 bytes and runs of white space")
    with tempfile.TemporaryFile("w+", encoding="utf-8") as spool:
        counts = _keep(texts, spool)
        alphabet = frequent(counts)[: int((vocab_size - len(head)) * SHARE)]
        learner = tokenizers.Tokenizer(models.BPE())
        without = pre_tokenizers.Split(BREAK, behavior="removed")
        learner.pre_tokenizer = pre_tokenizers.Sequence([without, _words(cut)])
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        learner.train_from_iterator(_spared(spool, counts, alphabet), trainer)
    rest = frequent(counts)  # fill ids left over when there are too few merges
    vocabulary = list(dict.fromkeys([*head, *alphabet, *by_id(learner), *rest]))[:vocab_size]
    learned = merges(learner, {token: i for i, token in enumerate(vocabulary)})
    made = with_fallback(vocabulary, learned, special, ignore_merges=bool(cut.white_runs))
    made.pre_tokenizer = _words(cut)
    return made


def _words(cut: Cutting) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(cut.pattern), behavior="isolated")


def _keep(texts: Iterable[str], spool: IO[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
        spool.write(json.dumps(text) + "\n")
    return counts


def _spared(spool: IO[str], counts: Counter[str], alphabet: Sequence[str]) -> Iterator[str]:
    """The texts, with characters outside the alphabet replaced by BREAK."""
    table = str.maketrans(dict.fromkeys(counts.keys() - set(alphabet), BREAK))
    spool.seek(0)
    for line in spool:
        text = json.loads(line)
        yield text.translate(table) if table else text
