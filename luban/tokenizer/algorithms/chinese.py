"""Chinese mixed with other scripts: every Chinese sign is a token of its own, everything else is byte-level BPE.

Vocabulary: the special tokens, the 256 bytes, runs of white space, the most frequent signs of the texts (at most half of what is left),
then merges by frequency. A sign outside the vocabulary is spelled in bytes, so nothing is lost.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, trainers

from luban.tokenizer.algorithms.bytelevel import ALPHABET, bytelevel_tokenizer, require_room, spelled, widened
from luban.tokenizer.cutting import Cutting

SIGN = r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"  # Chinese signs of the basic plane
SHARE = 0.5  # of the space behind the bytes, for signs, at the most


def train(texts: Iterable[str], vocab_size: int, special: Sequence[str], cut: Cutting) -> tokenizers.Tokenizer:
    """Learn at most `vocab_size` tokens. Streams over `texts`; memory grows with the number of different words only."""
    runs, fixed = [spelled(piece) for piece in cut.white_pieces], len(special) + 256
    require_room(vocab_size, fixed + len(runs), "special tokens, the 256 bytes and runs of white space")
    counts: Counter[str] = Counter()
    merged = bytelevel_tokenizer(models.BPE(), cut)
    without = pre_tokenizers.Split(Regex(SIGN), behavior="removed")  # bytes of signs must not be merged
    merged.pre_tokenizer = pre_tokenizers.Sequence([without, merged.pre_tokenizer])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=ALPHABET, show_progress=False
    )
    merged.train_from_iterator(_counted(texts, counts), trainer)
    space = min(int((vocab_size - fixed - len(runs)) * SHARE), len(counts))
    learned = merged.get_vocab_size() + len(runs)
    space = max(space, min(vocab_size - learned, len(counts)))  # merges that the texts do not yield leave space
    signs = [spelled(sign) for sign in sorted(counts, key=lambda sign: (-counts[sign], sign))[:space]]
    made = bytelevel_tokenizer(widened(merged, fixed, [*runs, *signs], vocab_size), cut, SIGN)
    made.add_special_tokens(list(special))
    return made


def _counted(texts: Iterable[str], counts: Counter[str]) -> Iterator[str]:
    """The texts, their signs counted on the way."""
    sign = re.compile(SIGN)
    for text in texts:
        counts.update(sign.findall(text))
        yield text
