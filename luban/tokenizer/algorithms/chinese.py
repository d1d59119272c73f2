"""Chinese mixed with other scripts: every Chinese sign is a token of its own, everything else is byte-level BPE.

Vocabulary: the special tokens, the 256 bytes, the most frequent signs of the texts (at most half of what is left),
then merges by frequency. A sign outside the vocabulary is spelled in bytes, so nothing is lost.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, WORDS, require_room

SIGN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"  # Chinese signs of the basic plane
SHARE = 0.5  # of the room behind the bytes, for signs, at the most
_SPELL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str]) -> tokenizers.Tokenizer:
    """Learn at most `vocab_size` tokens. Streams over `texts`; memory grows with the number of different words only."""
    fixed = len(special) + 256
    require_room(vocab_size, fixed, "special tokens and the 256 bytes")
    counts: Counter[str] = Counter()
    merged = _pieces(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=ALPHABET,
                                  show_progress=False)  # fmt: skip
    merged.train_from_iterator(_without_signs(texts, counts), trainer)
    learned = sorted(merged.get_vocab(), key=merged.get_vocab().__getitem__)
    room = min(int((vocab_size - fixed) * SHARE), len(counts))
    room = max(room, min(vocab_size - len(learned), len(counts)))  # merges that the texts do not yield leave room
    signs = [_spelled(sign) for sign in sorted(counts, key=lambda sign: (-counts[sign], sign))[:room]]
    kept = dict.fromkeys([*learned[:fixed], *signs, *learned[fixed:]])
    vocabulary = {token: i for i, token in enumerate(list(kept)[:vocab_size])}
    made = _pieces(models.BPE(vocabulary, _merges(merged, vocabulary), ignore_merges=True))
    made.add_special_tokens(list(special))
    return made


def _pieces(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SIGN), behavior="isolated"),
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        _SPELL,
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _without_signs(texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    """The texts with a line end for each sign, which is counted: bytes of signs must not be merged."""
    sign = re.compile(SIGN)
    for text in texts:
        counts.update(sign.findall(text))
        yield sign.sub("\n", text)


def _spelled(sign: str) -> str:
    return "".join(piece for piece, _ in _SPELL.pre_tokenize_str(sign))


def _merges(merged: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The learned merges whose parts and result are kept; signs need none, being whole pieces."""
    known = json.loads(merged.to_str())["model"]["merges"]
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in known]
    return [(a, b) for a, b in pairs if {a, b, a + b} <= vocabulary.keys()]
