"""Words and tokens by array operations are those of the patterns, and equal words have equal hashes everywhere."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from word_patterns import TOKEN, WORD

from luban.corpus import words as module
from luban.corpus.words import lowered, tokens, words

TEXTS = (
    st.text()
    | st.text(st.sampled_from("abAB01_ \n.,'é你好のカ한İΣσß😀\x1c\x85\u3000・हिन्दीका\u0301\u3099\ufe0f"))
    | st.text(st.characters(max_codepoint=127))
)


@given(TEXTS)
def test_runs_are_those_of_the_patterns(text):
    for runs, pattern, given_text in ((words(text), WORD, lowered(text)), (tokens(text), TOKEN, text)):
        spans = list(zip(runs.starts.tolist(), runs.ends.tolist(), strict=True))
        assert spans == [match.span() for match in pattern.finditer(given_text)]
        assert len(runs.hashes) == len(spans) == len(runs)
    assert len(lowered(text)) == len(text)
    assert [text[s:e] for s, e in zip(tokens(text).starts, tokens(text).ends, strict=True)] == text.split()


def test_a_hash_is_the_words_alone_wherever_it_stands(monkeypatch):
    rng = random.Random()
    monkeypatch.setattr(module, "CHUNK", 64)
    seen: dict[str, int] = {}
    for _ in range(200):
        text = " ".join("".join(rng.choices("abé你", k=rng.randint(1, 9))) for _ in range(rng.randint(0, 40)))
        found = words(text)
        for word, value in zip(WORD.findall(text), found.hashes.tolist(), strict=True):
            assert seen.setdefault(word, value) == value
    assert len(set(seen.values())) == len(seen) > 500


def test_vowel_signs_belong_to_their_word():
    """कि and की, กา and กี differ in a combining mark alone; an accent written as a mark is part of its word, too."""
    text = "हिन्दी में किताब की कीमत, ที่นี่ กา cafe\u0301 か\u3099く ❤\ufe0f"
    found = words(text)
    assert [text[s:e] for s, e in zip(found.starts, found.ends, strict=True)] == [
        "हिन्दी",
        "में",
        "किताब",
        "की",
        "कीमत",
        "ที่นี่",
        "กา",
        "cafe\u0301",
        "か\u3099",
        "く",
    ]
    for one, other in (("कि", "की"), ("กา", "กี"), ("か", "か\u3099"), ("cafe", "cafe\u0301")):
        assert words(one).hashes.tolist() != words(other).hashes.tolist()


@pytest.mark.parametrize("chunk", [4, 7])
def test_marks_stay_with_their_word_where_a_piece_ends(monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    module._powers.cache_clear()
    rng = random.Random()
    for _ in range(300):
        text = "".join(rng.choices("ab िी\u3099か.", k=rng.randint(0, 30)))
        found = words(text)
        whole = [match.span() for match in WORD.finditer(text)]
        if max((e - s for s, e in whole), default=0) < chunk:
            assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == whole, text
    module._powers.cache_clear()


def test_many_short_words_have_different_hashes():
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789_"
    found = words(" ".join(a + b + c for a in alphabet for b in alphabet for c in alphabet)).hashes
    assert len(np.unique(found)) == 37**3
    assert len(np.unique(found & np.uint64(0xFFFFFFFF))) > 37**3 - 10  # and so have their halves
    bits = [(found >> np.uint64(b)) & np.uint64(1) for b in range(64)]
    assert all(abs(bit.mean() - 0.5) < 0.02 for bit in bits)


@pytest.mark.parametrize("length", [3 * module.CHUNK, 2 * module.CHUNK + 17])
def test_long_texts_are_worked_on_in_pieces(length):
    rng = random.Random(0)
    text = "".join(rng.choices("ab é你 ", k=length))
    assert [text[s:e] for s, e in zip(words(text).starts, words(text).ends, strict=True)] == WORD.findall(text)
    cut = words("a" * length)  # only a word longer than a piece is cut
    assert cut.lengths.max() <= module.CHUNK and cut.lengths.sum() == length
    assert all(a == b for a, b in pairwise(cut.hashes[:2].tolist()))


def test_hashes_are_the_same_in_every_process():
    code = "from luban.corpus.words import words; print(words('the same 漢字').hashes.tolist())"
    shown = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert shown == {f"{words('the same 漢字').hashes.tolist()}\n"}
