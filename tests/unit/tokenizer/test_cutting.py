"""Digits, runs of white space and reserved tokens, by every algorithm: exact round trips, and what the options promise."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Library

from luban.core.artifact import read_manifest
from luban.core.errors import ConfigError
from luban.tokenizer.algorithms import ALGORITHMS
from luban.tokenizer.cutting import Cutting
from luban.tokenizer.special import SPECIAL_TOKENS
from luban.tokenizer.tokenizer import load_tokenizer
from luban.tokenizer.train import train_tokenizer

RUNS = 8
CUTS = {
    "single": Cutting(digits="single"),
    "whole": Cutting(digits="runs"),
    "white": Cutting(digits="single", white_runs=RUNS),
}
TEXT = [
    "def area(r):\n    return 3.14159 * r ** 2  # 1234567 in 2024\n\n\n",
    "\tif x:\n\t\tx = 100200\n        y = 7\n",
    "春眠不觉晓，处处闻啼鸟。 2023 年，naïve café 12345\n\n",
]
PIECES = st.lists(
    st.one_of(
        st.text(),
        st.integers(0, 10**9).map(str),
        st.sampled_from([" ", "\t", "\n", "\r\n"]).flatmap(
            lambda white: st.integers(1, 3 * RUNS).map(lambda n: white * n)
        ),
        st.sampled_from([*SPECIAL_TOKENS, "<|reserved_11|>", "<0x41>", "Ġ", "▁", "\u203f", "春眠", "def f"]),
    )
)


@pytest.fixture(scope="module", params=[(a, c) for a in sorted(ALGORITHMS) for c in CUTS if a != "char"], ids="-".join)
def made(request, tmp_path_factory):
    algorithm, cut = request.param
    out = tmp_path_factory.mktemp("cut") / "t"
    size = 640 if algorithm == "wordpiece" else 400
    return train_tokenizer(TEXT * 8, out, algorithm=algorithm, vocab_size=size, cut=CUTS[cut], reserved=12), CUTS[cut]


@settings(max_examples=60)
@given(parts=PIECES)
def test_any_text_comes_back(made, parts):
    tokenizer, text = made[0], "".join(parts)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())


def test_digits_are_cut_as_asked(made):
    tokenizer, cut = made
    longest = max(
        len(piece)
        for piece in map(tokenizer.decode, ([i] for i in range(tokenizer.vocab_size)))
        if piece.isdigit() and piece.isascii()
    )
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("x = 1234567")]
    if cut.digits == "single":
        assert longest == 1 and pieces[-7:] == list("1234567")
    else:
        assert longest > 3 and max(map(len, pieces)) > 3


def test_every_run_of_white_space_is_one_token(made):
    tokenizer, cut = made
    for length in range(2, cut.white_runs + 1):
        for white in " \t\n":
            assert len(tokenizer.encode(white * length)) == 1
        assert tokenizer.encode(" " * (length + 1) + "zq")[0] == tokenizer.encode(" " * length)[0]
    if cut.white_runs:
        assert len(tokenizer.encode(" " * 3 * RUNS)) == 3


def test_options_are_kept_and_exported(made):
    tokenizer, cut = made
    config = read_manifest(tokenizer.path).config
    assert (config["digits"], config["white_runs"]) == (cut.digits, cut.white_runs)
    special = [f"<|reserved_{i}|>" for i in range(12)]
    assert config["special"][-12:] == special and [tokenizer.special[s] for s in special] == list(range(7, 19))
    exported = Library.from_file(str(tokenizer.path / "tokenizer.json"))  # by the library alone
    exported.encode_special_tokens = True
    rng = random.Random(0)
    for _ in range(50):
        text = "".join(rng.choices([*TEXT, "  ", "\n", "42", "中"], k=4))
        assert exported.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    assert load_tokenizer(tokenizer.path).content_hash == tokenizer.content_hash
    assert (
        json.loads((tokenizer.path / "tokenizer_config.json").read_text())["additional_special_tokens"][-1]
        == special[-1]
    )


@pytest.mark.parametrize("algorithm", sorted(set(ALGORITHMS) - {"char"}))
def test_the_same_texts_give_the_same_artifact(algorithm, tmp_path):
    hashes = {
        train_tokenizer(
            TEXT * 8, tmp_path / str(i), algorithm=algorithm, vocab_size=620, cut=CUTS["white"]
        ).content_hash
        for i in range(2)
    }
    assert len(hashes) == 1


@pytest.mark.parametrize("letters", ["abcdefgh", "абвгд", "春眠不觉晓处处闻啼鸟", "กขคงจ", "!?", "a春"])
def test_no_word_of_a_wordpiece_vocabulary_is_long(letters, tmp_path):
    """The library's search is cubic in a word's length, so no text may give it long words."""
    rng = random.Random(1)
    for cut in (Cutting(), Cutting(digits="single", white_runs=40)):
        tokenizer = train_tokenizer(
            TEXT * 8, tmp_path / f"{cut.white_runs}", algorithm="wordpiece", vocab_size=760, cut=cut
        )
        library = Library.from_file(str(tokenizer.path / "tokenizer.json"))
        text = "".join(rng.choices(letters, k=3000)) + "\n" * 40 + "x" * 31 + " " * 40 + "\t" * 40
        words = [word for word, _ in library.pre_tokenizer.pre_tokenize_str(text)]
        assert max(map(len, words)) <= max(4 * 32, cut.white_runs), max(words, key=len)  # bytes
        assert tokenizer.decode(tokenizer.encode(text)) == text
        if cut.white_runs:
            assert all(len(tokenizer.encode(white * n)) == 1 for white in " \t\n" for n in (2, 31, 40))


PHRASES = {
    "hi": "हिन्दी में यह एक छोटा वाक्य है और यह बार बार आता है",
    "bn": "বাংলা একটি সুন্দর ভাষা এবং আমি বাংলায় গান গাই",
    "ta": "தமிழ் மிகவும் பழமையான மொழி ஆகும்",
    "ar": "العَرَبِيَّةُ لُغَةٌ جَمِيلَةٌ",
    "nfd": "une de\u0301ja\u0300 vue e\u0301te\u0301",
}


@pytest.mark.parametrize("algorithm", ["bpe", "charbpe", "chinese", "wordpiece"])
def test_words_with_vowel_signs_are_learned_whole(algorithm, tmp_path):
    """A word that is seen 800 times becomes one token, whatever combining marks it holds."""
    phrases = list(PHRASES.values())
    tokenizer = train_tokenizer(phrases * 800, tmp_path / "t", algorithm=algorithm, vocab_size=1500)
    for phrase in phrases:
        assert len(tokenizer.encode(phrase)) <= len(phrase.split()), phrase


def test_marks_stay_in_their_word_and_nothing_else_changes_place():
    """The words of the pattern, against words found character by character."""
    rng, pattern = random.Random(), Cutting().pattern
    library = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    for text in ["हिन्दी में", "की कि", "cafe\u0301s x", "❤\ufe0f❤\ufe0f", "1\ufe0f\u20e3"]:
        pieces = [piece for piece, _ in library.pre_tokenize_str(text)]
        assert "".join(pieces) == text
        assert not any(unicodedata.category(piece[0]) == "Mc" for piece in pieces)
    for _ in range(300):
        text = "".join(rng.choices("कािी्e\u0301x. \n1", k=12))
        pieces = [piece for piece, _ in library.pre_tokenize_str(text)]
        assert "".join(pieces) == text
        for one, other in itertools.pairwise(pieces):
            assert not (one[-1].isalpha() and unicodedata.category(other[0]).startswith("M")), (one, other)


def test_wrong_choices_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'single'"):
        Cutting(digits="singel")
    with pytest.raises(ConfigError, match="2 to 256"):
        Cutting(white_runs=1)
    with pytest.raises(ConfigError, match="every character is a token"):
        train_tokenizer(TEXT, tmp_path / "c", algorithm="char", cut=CUTS["single"])
    with pytest.raises(ConfigError, match="at least 9"):
        train_tokenizer(TEXT, tmp_path / "c", reserved=3)
    with pytest.raises(ConfigError, match="runs of white space alone need"):
        train_tokenizer(TEXT, tmp_path / "c", vocab_size=280, cut=CUTS["white"])
    assert not list(tmp_path.iterdir())


def test_characters_that_are_left_out_are_spelled_in_bytes_and_never_merged_across(tmp_path):
    """Byte-pair encoding over characters: `axb` must not teach the pair `ab` where `x` has no room."""
    rare = [chr(0x4E00 + i) for i in range(30)]
    texts = ["".join(f"ab{sign}cd" for sign in rare) + " abab" * 40 + " cd" * 90]
    tokenizer = train_tokenizer(texts, tmp_path / "t", algorithm="charbpe", vocab_size=16 + 256 + 14)
    pieces = {tokenizer.token(i) for i in range(272, tokenizer.vocab_size)}
    assert {"ab", "cd", " cd"} <= pieces and "bc" not in pieces
    assert len(tokenizer.encode(rare[-1])) == 3 and tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
