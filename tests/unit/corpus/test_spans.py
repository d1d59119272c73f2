"""C4's two rules beyond lines: three-sentence spans that repeat, and pages with a listed word."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luban.core.errors import DataError
from luban.corpus.document import Document
from luban.corpus.steps import identity, make_step
from luban.corpus.steps.spans import SPAN, sentences
from luban.corpus.tally import Tally


@given(st.text(st.sampled_from('ab .!?。！\n"”)3'), max_size=60) | st.text())
def test_sentences_together_are_the_text(text):
    assert "".join(sentences(text)) == text


def test_sentences_end_where_readers_end_them():
    text = 'Hello there. "Yes," he said (twice!). It is 3.14 now?! Ok\nnew line\n\n你好。再见！'
    assert [s.strip() for s in sentences(text)] == [
        "Hello there.",
        '"Yes," he said (twice!).',
        "It is 3.14 now?!",
        "Ok",
        "new line",
        "你好。",
        "再见！",
    ]


def brute_force(texts: list[str]) -> list[str]:
    """A sentence goes if any window of three around it has been seen."""
    seen, left = set(), []
    for text in texts:
        parts = text.split(" ")
        gone = set()
        for i in range(len(parts) - SPAN + 1):
            window = tuple(parts[i : i + SPAN])
            gone |= set(range(i, i + SPAN)) if window in seen else set()
            seen.add(window)
        left.append("".join(p + " " * (i < len(parts) - 1) for i, p in enumerate(parts) if i not in gone))
    return left


def test_the_decision_is_that_of_brute_force():
    rng = random.Random()
    texts = [" ".join(f"S{rng.randint(0, 5)}." for _ in range(rng.randint(1, 30))) for _ in range(60)]
    documents = [Document(id=str(i), text=text, source="s") for i, text in enumerate(texts)]
    tally = Tally()
    found = {d.id: d.text for d in make_step("spans")(documents, tally)}
    wanted = {str(i): text for i, text in enumerate(brute_force(texts)) if text.strip()}
    assert found == wanted
    assert (
        tally.dropped["spans"]["documents"] == 60 - len(wanted)
        and tally.counts["sentences_in_repeated_spans_removed"] > 60
    )


def test_planted_notices_go_whatever_their_case_and_spaces():
    notice = "This site is free. Please register now. All rights are reserved."
    pages = [
        f"First page number {i}. It says something new of its own {i}. {n} And an end {i}."
        for i, n in enumerate([notice, notice.upper(), notice.replace(" ", "  "), "Nothing of the kind."])
    ]
    found = [d.text for d in make_step("spans")([Document(id=p, text=p, source="s") for p in pages], Tally())]
    assert found[0] == pages[0] and found[3] == pages[3]
    assert found[1] == "First page number 1. It says something new of its own 1. And an end 1."
    assert "register" not in found[2].lower()


PAGE = "The weather was fine in the morning.\nWe walked along the quiet river bank.\nEverybody was pleased with the {} that day.\n"


def test_pages_with_a_listed_word_are_dropped(tmp_path):
    (tmp_path / "bad.txt").write_text("Rhubarb\n\nblue  cheese\n大黄\n")
    words = ["rhubarb", "RHUBARB", "rhubarbs", "blue  cheese", "cake", "好大黄吗"]
    pages = [Document(id=word, text=PAGE.format(word), source="s") for word in words]
    tally = Tally()
    assert [d.id for d in make_step(f"c4={tmp_path / 'bad.txt'}")(pages, tally)] == ["rhubarbs", "cake"]
    assert tally.dropped["c4: bad word"]["documents"] == 4
    assert [d.id for d in make_step("c4")(pages, Tally())] == words
    assert identity("c4") == "c4" and "bad_words" in identity(f"c4={tmp_path / 'bad.txt'}")
    for content in (None, " \n"):
        path = tmp_path / "none.txt"
        if content is not None:
            path.write_text(content)
        with pytest.raises(DataError, match=r"none\.txt"):
            make_step(f"c4={path}")
