"""Streamed text: equal to the whole, never a torn character, never a piece of a stop string."""

from __future__ import annotations

import random

import pytest

from luban.generate.text import TextStream, overlap
from luban.tokenizer.tokenizer import load_tokenizer

ALPHABET = "ab c\n¿é中😀👩‍🔬"


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return load_tokenizer(tiny_checkpoint)


def stream(tokenizer, ids, stop=()):
    """(pieces, whether it stopped) of pushing token by token as an engine does."""
    text, pieces = TextStream(tokenizer, stop), []
    for token in ids:
        pieces.append(text.push(token))
        if text.stopped:
            break
    pieces.append(text.finish())
    assert text.text == "".join(pieces)
    return pieces, text.stopped


@pytest.mark.parametrize("_", range(20))
def test_pieces_join_to_the_text(tokenizer, _):
    text = "".join(random.choices(ALPHABET, k=60))
    pieces, _ = stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("_", range(40))
def test_stop_strings_end_the_text_at_the_earliest_place(tokenizer, _):
    text = "".join(random.choices("ab中", k=40))
    stop = tuple("".join(random.choices("ab中", k=random.randint(1, 6))) for _ in range(2))
    pieces, stopped = stream(tokenizer, tokenizer.encode(text), stop)
    ends = [text.find(s) + len(s) for s in stop if s in text]
    first = min((text.find(s) for s in stop if s in text and text.find(s) + len(s) == min(ends)), default=len(text))
    assert "".join(pieces) == text[:first], (text, stop)
    assert stopped == bool(ends)


def test_what_may_begin_a_stop_string_is_held_back(tokenizer):
    text = TextStream(tokenizer, ("STOP",))
    assert [text.push(t) for t in tokenizer.encode("aSTaST")] == ["a", "", "", "STa", "", ""]
    assert text.finish() == "ST" and not text.stopped


def test_bytes_that_are_no_text_are_shown_once(tokenizer):
    torn = tokenizer.encode("é")[0]
    pieces, _ = stream(tokenizer, [torn] * 30 + tokenizer.encode("ok"))
    assert "".join(pieces) == "\ufffd" * 30 + "ok"
    pieces, _ = stream(tokenizer, [*tokenizer.encode("a"), torn])
    assert pieces == ["a", "", "\ufffd"]


def test_special_tokens_give_no_text(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("x"), tokenizer.special["<|user|>"], *tokenizer.encode("y")]
    assert "".join(stream(tokenizer, ids)[0]) == "xy"


def test_overlap():
    assert overlap("abab", "abc") == 2 and overlap("xyz", "zyx") == 1 and overlap("abc", "abc") == 0
