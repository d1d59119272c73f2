"""Words are the same whether or not the quick way for ASCII is taken."""

from __future__ import annotations

import random

from luban.corpus.words import WORD, words


def test_ascii_words_are_those_of_the_pattern():
    rng = random.Random(1)
    for _ in range(200):
        text = "".join(chr(rng.randrange(128)) for _ in range(100))
        assert words(text) == WORD.findall(text.lower())


def test_chinese_signs_are_words_of_their_own():
    assert words("Das Häuschen 2nd_try 你好world") == ["das", "häuschen", "2nd_try", "你", "好", "world"]
