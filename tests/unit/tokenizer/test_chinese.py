"""Chinese signs are tokens of their own; everything else is byte-level BPE; nothing is lost."""

from __future__ import annotations

import random

import pytest

from luban.core.errors import ConfigError
from luban.tokenizer.train import train_tokenizer

POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
CODE = "def first(value):\n    return value + 1  # the first value\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    texts = [POEM, CODE, "mixed 春 and words 风雨 here"] * 20
    return train_tokenizer(texts, tmp_path_factory.mktemp("t") / "t", algorithm="chinese", vocab_size=340)


def test_every_sign_is_one_token_whatever_stands_beside_it(made):
    signs = [c for c in POEM if c not in "，。"]
    assert all(len(made.encode(sign)) == 1 for sign in signs)
    for text in ("风雨", "x风雨y", "（风）雨1"):
        pieces = [made.decode([i]) for i in made.encode(text)]
        assert "风" in pieces and "雨" in pieces
    assert not any(sum("\u4e00" <= c <= "\u9fff" for c in made.decode([i])) > 1 for i in range(made.vocab_size))


def test_other_text_is_merged_and_unknown_signs_are_bytes(made):
    assert len(made.encode("value")) < 5
    assert len(made.encode("鬱")) == 3
    rng = random.Random(2)
    for _ in range(300):
        text = "".join(rng.choices(POEM + CODE + "鬱é😀\u200d\n\x00 ", k=30))
        assert made.decode(made.encode(text)) == text


def test_the_most_frequent_signs_fill_half_the_room(tmp_path):
    texts = ["春" * 9 + "眠" * 5 + "晓" * 2 + " words word wording worded" * 30] * 5
    small = train_tokenizer(texts, tmp_path / "t", algorithm="chinese", vocab_size=16 + 256 + 4)
    assert [len(small.encode(sign)) for sign in "春眠晓"] == [1, 1, 3]
    with pytest.raises(ConfigError, match="too small"):
        train_tokenizer(texts, tmp_path / "u", algorithm="chinese", vocab_size=200)


@pytest.mark.parametrize("algorithm", ["chinese", "charbpe"])
def test_what_is_left_out_of_the_merges_teaches_no_other_merge(algorithm, tmp_path):
    """A poem's line has no line ends in it, so no run of them may be learned from it."""
    signs = "".join(chr(0x4E00 + i) for i in range(3000))
    made = train_tokenizer([signs, "word words wording " * 50], tmp_path / "t", algorithm=algorithm, vocab_size=300)
    pieces = [made.decode([i]) for i in range(made.vocab_size)]
    assert not any("\n\n" in piece or "\uffff" in piece for piece in pieces)
    assert made.vocab_size == 300 and "word" in "".join(pieces)
