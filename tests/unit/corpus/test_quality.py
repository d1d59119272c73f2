"""C4's and Gopher's rules: each met by a text made for it, at its threshold, and n-gram shares by brute force."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from luban.corpus.document import Document
from luban.corpus.steps import gopher as rules
from luban.corpus.steps.c4 import C4, clean
from luban.corpus.steps.gopher import counts, duplicate_share, gopher, longest, top_share
from luban.corpus.tally import Tally
from luban.corpus.words import tokens


def quality(text: str) -> str | None:
    return rules.quality(text, tokens(text))


def repetition(text: str) -> str | None:
    return rules.repetition(text, tokens(text))


def prose(seed: int = 0, count: int = 120) -> str:
    """Different made-up words with enough stop words, in lines of ten."""
    rng = random.Random(seed)
    found = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(4, 8))) for _ in range(count)]
    for place in range(0, count, 12):
        found[place] = rng.choice(["the", "of", "and", "to"])
    found[0], found[1] = "the", "of"
    return "\n".join(" ".join(found[i : i + 10]) for i in range(0, count, 10))


def test_prose_passes():
    for seed in range(20):
        assert quality(prose(seed)) is None and repetition(prose(seed)) is None


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda t: " ".join(t.split()[:49]), "number of words"),
        (lambda t: t + " word" * 100_000, "number of words"),
        (lambda t: t + " a" * 400, "word length"),
        (lambda t: t + " " + "x" * 2000, "word length"),
        (lambda t: t + " #" * 14, "symbols"),
        (lambda t: t + " …" * 14, "symbols"),
        (lambda t: "\n".join("- " + line for line in t.splitlines()), "bullet points"),
        (
            lambda t: "\n".join(line + "..." if i % 3 == 0 else line for i, line in enumerate(t.splitlines())),
            "ellipses",
        ),
        (lambda t: t + " 12345" * 40, "alphabetic words"),
        (lambda t: " ".join(w for w in t.split() if w not in ("the", "of", "and", "to")), "stop words"),
    ],
)
def test_each_quality_rule(change, reason):
    assert quality(change(prose())) == reason


def test_quality_thresholds_are_inclusive():
    words = prose().split()
    assert quality(" ".join(words[:50])) is None
    assert quality(" ".join([*words[:100], *["#"] * 10])) is None  # 10 of 110 words


def test_each_repetition_rule():
    lines = prose(1, 300).splitlines()
    assert repetition("\n".join([*lines[:20], *lines[:10]])) == "repeated lines"  # 10 of 30 lines are repeats
    assert repetition("\n".join([*lines[:26], *lines[:4]])) != "repeated lines"  # 4 of 30
    blocks = ["\n".join(prose(seed, 40).splitlines()) for seed in range(6)]
    assert repetition("\n\n".join([*blocks, *blocks[:1]])) not in ("repeated lines", "repeated paragraphs")
    assert repetition("the end " * 30 + prose(2).replace("\n", " ")) == "most frequent 2-gram"


@pytest.mark.parametrize("n", range(2, 11))
def test_ngram_shares_are_those_of_brute_force(n):
    rng = random.Random(n)
    for _ in range(60):
        words = rng.choices(["a", "bb", "ccc", "dddd"], k=rng.randint(0, 60))
        found = tokens(" ".join(words))
        hashes, lengths = found.hashes, found.lengths
        assert lengths.tolist() == [len(w) for w in words]
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen, covered = set(), set()
        for i, gram in enumerate(grams):
            if gram in seen:
                covered |= set(range(i, i + n))
            seen.add(gram)
        total = sum(map(len, words))
        assert duplicate_share(hashes, lengths, n) == pytest.approx(sum(len(words[i]) for i in covered) / max(total, 1))
        best = max(Counter(grams).values(), default=0)
        first = next((gram for gram in grams if grams.count(gram) == best), ())
        expected = best * sum(map(len, first)) / total if best > 1 else 0.0
        assert top_share(hashes, lengths, n) == pytest.approx(expected)
        often, repeated = counts(hashes, n)
        assert (often, repeated) == (best, len(grams) - len(set(grams)))
        share = longest(np.concatenate([[0], np.cumsum(lengths)]), n)
        assert often * share >= top_share(hashes, lengths, n) - 1e-12
        assert repeated * share >= duplicate_share(hashes, lengths, n) - 1e-12
        assert counts(hashes, n + 1)[0] <= often and counts(hashes, n + 1)[1] <= repeated


def test_words_without_a_letter_are_counted_alike_in_ascii_and_beyond():
    rng = random.Random(3)
    for _ in range(300):
        text = "".join(rng.choices("ab1-. \n\t\x1c\x00", k=60))
        expected = sum(not any(c.isalpha() for c in word) for word in text.split())
        for more, extra in (("", 0), (" é ½ 漢 𝟙", 2)):
            found = tokens(text + more)
            assert len(found) - rules.with_letter(text + more, found) == expected + extra


def test_gopher_counts_by_rule_and_lets_conversations_pass():
    documents = [
        Document(id="a", text=prose(), source="s"),
        Document(id="b", text="too short", source="s"),
        Document(id="c", text="q\na", source="s", messages=[{"role": "user", "content": "q"}]),
    ]
    tally = Tally()
    assert [d.id for d in gopher(documents, tally)] == ["a", "c"]
    assert tally.dropped == {"gopher: number of words": {"documents": 1, "bytes": 9}}


PAGE = (
    "Home\nThis is the first good sentence here.\nMenu | About | More\nAnd this is another one, isn't it?\n"
    'She said "we are the third sentence."\nShort one.\nPlease enable Javascript to see this page.\n'
    "Read our privacy policy before you go on.\nIt trails off into nothing at all...\nA cited fact stands here.[12]\n"
)


def test_c4_keeps_the_lines_that_are_sentences():
    assert clean(PAGE) == (
        None,
        "This is the first good sentence here.\nAnd this is another one, isn't it?\n"
        'She said "we are the third sentence."\nA cited fact stands here.',
    )


@pytest.mark.parametrize(
    "text, reason",
    [
        (PAGE + "Lorem Ipsum dolor sit amet.", "lorem ipsum"),
        (PAGE + "function() {", "curly bracket"),
        ("This is one good sentence here. And here is a second.", "too few sentences"),
        ("", "too few sentences"),
    ],
)
def test_c4_drops_pages(text, reason):
    assert clean(text)[0] == reason


def test_c4_counts_what_it_removes():
    tally = Tally()
    found = list(C4()([Document(id="a", text=PAGE, source="s"), Document(id="b", text="x", source="s")], tally))
    assert [d.id for d in found] == ["a"]
    assert tally.counts["c4_bytes_removed"] == len(PAGE) - len(found[0].text)
    assert tally.dropped["c4: too few sentences"]["documents"] == 1
