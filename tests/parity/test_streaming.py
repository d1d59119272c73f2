"""Streamed text is the decoded text, for every vocabulary that can be read, whatever the tokens and what stood before."""

from __future__ import annotations

import random

import pytest
from vocabularies import VOCABULARIES

from luban.generate.text import TORN, UNFINISHED, TextStream

TEXTS = ["the row", "漢🐉 xyz", "a\u0301 naïve café —", "हिन्दी में", "  two  spaces", "x\n\ny", "👩‍🔬", "don't , stop ."]


@pytest.fixture(scope="module", params=VOCABULARIES.items(), ids=list(VOCABULARIES))
def tokenizer(request, tmp_path_factory):
    name, make = request.param
    return make(tmp_path_factory.mktemp(name))


def drawn(tokenizer, rng: random.Random) -> list[int]:
    """Ids of texts, cut anywhere, among random ids and special tokens."""
    ids: list[int] = []
    while len(ids) < rng.choice([1, 5, 60]):
        whole = tokenizer.encode(rng.choice(TEXTS)) or [0]
        cut = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
        ids += rng.choice(
            [
                whole,
                whole,
                whole[slice(*cut)],
                [rng.randrange(tokenizer.vocab_size)],
                rng.choices(list(tokenizer.special.values()) or [0], k=rng.choice([1, 1, 20])),
            ]
        )
    return ids


def streamed(tokenizer, ids: list[int], context: list[int]) -> list[str]:
    stream = TextStream(tokenizer, (), context)
    pieces = [stream.push(token) for token in ids]
    return [*pieces, stream.finish()]


def test_streamed_text_is_the_decoded_text(tokenizer):
    rng = random.Random()
    checked = 0
    for number in range(120):
        ids, context = drawn(tokenizer, rng), drawn(tokenizer, rng) if number % 2 else []
        before = tokenizer.decode(context)
        if before.endswith(TORN):
            continue
        pieces = streamed(tokenizer, ids, context)
        whole = tokenizer.decode([*context, *ids])
        assert whole.startswith(before) and before + "".join(pieces) == whole, (context, ids)
        for count in range(len(ids) + 1):  # what is certain is shown at once
            known = tokenizer.decode([*context, *ids[:count]])
            shown = before + "".join(pieces[:count])
            unfinished = min(len(known) - len(known.rstrip(TORN)), UNFINISHED)
            assert known[: len(known) - unfinished] == shown, (context, ids[:count])
        checked += 1
    assert checked > 40


def test_a_text_is_streamed_whole_and_never_torn(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids, [])
        assert "".join(pieces) == tokenizer.decode(ids)
        if TORN not in tokenizer.decode(ids):
            assert not any(TORN in piece for piece in pieces)


def test_a_continuation_keeps_its_space(tokenizer):
    """A text cut between two words: what comes behind the prompt is the rest of the text."""
    text = "the row the row"
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    for count in range(1, len(ids)):
        assert tokenizer.decode(ids[:count]) + "".join(streamed(tokenizer, ids[count:], ids[:count])) == whole


def test_every_token_costs_the_same(tokenizer):
    """A thousand tokens are decoded in windows, not from the beginning each time."""
    rng = random.Random()
    stream = TextStream(tokenizer)
    special = set(tokenizer.special.values())
    for token in [i for _ in range(150) for i in tokenizer.encode(rng.choice(TEXTS))] + [
        rng.choice([*special, 0])
    ] * 300:
        stream.push(token)
        assert len([i for i in stream.window if i not in special]) <= 64 and len(stream.window) <= 128


def test_half_a_character_before_a_text_is_not_part_of_it(tokenizer):
    before, ids = tokenizer.encode("🐉")[:1], tokenizer.encode("x")
    shown = tokenizer.decode(before)
    expected = tokenizer.decode(ids) if shown.endswith(TORN) else tokenizer.decode([*before, *ids])[len(shown) :]
    assert "".join(streamed(tokenizer, ids, before)) == expected
