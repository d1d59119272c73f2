"""Passages: spans of the source text, of the length asked for, that leave no word out."""

from __future__ import annotations

import itertools
import random

import pytest
from tiny_models import write_byte_tokenizer

from luban.core.errors import ConfigError
from luban.corpus.document import Document
from luban.corpus.words import words
from luban.retrieval.documents import passages_of
from luban.retrieval.passages import PassageRule
from luban.retrieval.passages.document import WholeDocument
from luban.retrieval.passages.headings import Headings
from luban.retrieval.passages.sentences import Sentences, sentences
from luban.retrieval.passages.tokens import Tokens
from luban.retrieval.passages.units import pack
from luban.retrieval.passages.words import Words

ALPHABET = [
    "word",
    "Two",
    "naïve",
    "x_1",
    ",",
    ".",
    "…",
    " ",
    "\n",
    "\n\n",
    "汉",
    "语",
    "。",
    "！",
    "(",
    ")",
    '"',
    "é",
    "🙂",
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choices(ALPHABET, k=rng.randrange(120)))


@pytest.mark.parametrize("make", [Words, Sentences, Headings])
def test_every_word_is_in_a_passage_of_the_right_length(make):
    rng = random.Random()
    for _ in range(60):
        text, length = random_text(rng), rng.randrange(1, 12)
        spans = list(make(length=length).spans(text))
        found = words(text)
        held = [
            sum(start >= span.start and end <= span.stop for start, end in zip(found.starts, found.ends, strict=True))
            for span in spans
        ]
        assert sum(held) == len(found), (text, spans)  # without overlap each word is in one passage
        assert all(1 <= count <= length for count in held), (text, spans)
        assert all(a.stop <= b.start for a, b in itertools.pairwise(spans))


def test_words_repeat_the_overlap_and_keep_touching_punctuation():
    text = 'He said: "one two", (three) four-five.  Six!'
    spans = list(Words(length=3, overlap=1).spans(text))
    assert [text[a:b] for a, b, _ in spans] == [
        'He said: "one',
        '"one two", (three)',
        "(three) four-five.",
        "five.  Six!",
    ]
    text = "天地玄黄。宇宙"
    assert [text[a:b] for a, b, _ in Words(length=2).spans(text)] == ["天地", "玄黄。", "宇宙"]


def test_sentences_end_at_marks_not_at_abbreviations():
    text = "Dr. Smith et al. left. “Why?” he asked… 他来了！她说：“好。”走吧 It costs 3.5 e.g. here.\n\nTitle\n\nEnd"
    found = [text[a:b] for a, b in sentences(text)]
    assert (
        found[0] == "Dr. Smith et al. left."
        and found[1] == "“Why?”"
        and "他来了！" in found
        and "她说：“好。”" in found
    )
    assert "Title" in found and "走吧 It costs 3.5 e.g. here." in found


def test_long_sentences_are_divided_and_short_ones_joined():
    text = "a b c d e f g. h i. j k. l m n o."
    spans = [text[a:b] for a, b, _ in Sentences(length=4).spans(text)]
    assert spans == ["a b c d", "e f g.", "h i. j k.", "l m n o."]


def test_packing_against_brute_force():
    rng = random.Random()
    for _ in range(200):
        sizes = [rng.randrange(0, 9) for _ in range(rng.randrange(1, 30))]
        length, overlap = rng.randrange(2, 15), rng.randrange(0, 2)
        runs = list(pack(sizes, length, overlap))
        assert runs[0][0] == 0 and runs[-1][1] == len(sizes)
        for (a, b), (c, d) in itertools.pairwise(runs):
            assert a < c <= b < d and sum(sizes[c:b]) <= overlap and (overlap or c == b)
        for first, last in runs:
            assert last - first == 1 or sum(sizes[first:last]) <= length


def test_headings_title_their_sections():
    text = (
        "intro\n# A #\none\n```\n# no heading\n```\n## B\ntwo\n# C\n\nthree\n\nTitle\n=====\nfour\n\nSub\n---\nfive\n"
    )
    found = [(title, text[a:b]) for a, b, title in Headings().spans(text)]
    assert found == [
        ("", "intro"),
        ("A", "one\n```\n# no heading\n```"),
        ("A > B", "two"),
        ("C", "three"),
        ("Title", "four"),
        ("Title > Sub", "five"),
    ]


def test_tokens_are_windows_of_the_tokenizer(tmp_path):
    write_byte_tokenizer(tmp_path)
    text = "abcdefghij"
    spans = list(Tokens(length=4, overlap=1, tokenizer=str(tmp_path)).spans(text))
    assert [text[a:b] for a, b, _ in spans] == ["abcd", "defg", "ghij"]
    assert not list(Tokens(length=4, tokenizer=str(tmp_path)).spans(" \n"))
    with pytest.raises(ConfigError, match="--tokenizer"):
        list(Tokens().spans("a"))


@pytest.mark.parametrize("text", ["", "   \n", "...!?", "—"])
def test_a_text_without_words_has_no_passage(text):
    for make in (Words, Sentences, Headings, WholeDocument):
        assert not list(make().spans(text))


def test_a_long_line_is_divided_in_little_time():
    text = "-" * 500_000 + " word" * 20_000 + "." * 500_000
    spans = list(Words().spans(text))
    assert len(spans) == 200 and spans[0].start == 500_001
    assert len(list(Sentences().spans(text))) >= 200


def test_rules_refuse_impossible_sizes():
    with pytest.raises(ConfigError, match="length"):
        Words(length=0)
    with pytest.raises(ConfigError, match="overlap"):
        PassageRule.registry["sentences"](length=5, overlap=5)


def test_passages_know_their_source():
    document = Document(id="notes/a.md", text="One two three", source="notes", meta={"title": "T", "licence": "MIT"})
    first, second = passages_of(document, Words(length=2))
    assert (first.text, first.title, first.source, first.licence) == ("One two", "T", "notes/a.md", "MIT")
    assert document.text[second.start : second.stop] == second.text == "three"
    (untitled,) = passages_of(Document(id="notes/sub/b.txt", text="x", source="notes"), Words())
    assert untitled.title == "b.txt"
