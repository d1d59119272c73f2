"""Shared code of byte-level algorithms: words as bytes, and pieces added to a learned vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from luban.core.errors import ConfigError
from luban.tokenizer.cutting import Cutting

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes as printable characters (GPT-2)
_SPELL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def bytelevel_tokenizer(model: models.Model, cut: Cutting, *alone: str) -> tokenizers.Tokenizer:
    """A tokenizer that cuts words, spells them in bytes and joins bytes back without loss.

    Args:
        alone: regular expressions of what stands alone before words are cut.
    """
    tokenizer = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in (*alone, cut.pattern)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, _SPELL])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def spelled(text: str) -> str:
    """`text` in the alphabet of bytes."""
    return "".join(piece for piece, _ in _SPELL.pre_tokenize_str(text))


def by_id(tokenizer: tokenizers.Tokenizer) -> list[str]:
    """The vocabulary in the order of its ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def widened(learned: tokenizers.Tokenizer, fixed: int, pieces: Sequence[str], vocab_size: int) -> models.BPE:
    """A learned BPE with whole-word `pieces` behind its `fixed` first ids; the last merges give way to them."""
    known = by_id(learned)
    kept = dict.fromkeys([*known[:fixed], *pieces, *known[fixed:]])
    vocabulary = {token: i for i, token in enumerate(list(kept)[:vocab_size])}
    return models.BPE(vocabulary, merges(learned, vocabulary), ignore_merges=True)


def merges(learned: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The learned merges whose parts and result are in `vocabulary`; whole words need none."""
    known = json.loads(learned.to_str())["model"]["merges"]
    pairs = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in known]
    return [(a, b) for a, b in pairs if {a, b, a + b} <= vocabulary.keys()]


def require_room(vocab_size: int, smallest: int, parts: str) -> None:
    """Raise ConfigError when the vocabulary cannot even hold its fixed entries."""
    if vocab_size < smallest:
        raise ConfigError(f"vocabulary of {vocab_size} is too small: {parts} alone need {smallest}")
