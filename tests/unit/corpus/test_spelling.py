"""Planted slips are repaired; what is no slip stays; everything is counted and shown."""

from __future__ import annotations

import random

import pytest

from luban.core.errors import ConfigError, DataError
from luban.corpus.build import build_corpus
from luban.corpus.document import Document
from luban.corpus.steps import make_step
from luban.corpus.steps.spelling import WORD, Spelling
from luban.corpus.tally import Tally

PROSE = (
    "The committee will publish its findings about the water supply before the end of next year. Several members asked "
    "whether the government should continue the present policy, because recent measurements suggest another problem. "
    "However, nobody expected that the children would remember every important question after such a difficult journey. "
    "During summer the company usually produces different materials, although customers sometimes prefer traditional ones."
)


@pytest.fixture(scope="module")
def spelling():
    pytest.importorskip("symspellpy")
    return Spelling()


def slip(word: str, rng: random.Random) -> str:
    """One insertion, deletion, replacement or transposition, not at the first letter."""
    i, letter = rng.randrange(1, len(word)), rng.choice("abcdefghijklmnopqrstuvwxyz")
    forms = [word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + letter + word[i + 1 :]]
    return rng.choice([*forms, word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]])


def test_planted_slips_are_repaired_and_sound_text_stays(spelling):
    assert spelling.text(PROSE, []) == PROSE
    rng = random.Random()
    found = right = planted = 0
    for _ in range(300):
        place = rng.choice([m for m in WORD.finditer(PROSE) if len(m[0]) >= 7 and PROSE.count(m[0]) == 1])
        wrong = slip(place[0], rng)
        if wrong in spelling.words.words:
            continue
        planted += 1
        changes: list[tuple[str, str]] = []
        text = spelling.text(PROSE[: place.start()] + wrong + PROSE[place.end() :], changes)
        found += bool(changes)
        right += text == PROSE
        assert len(changes) <= 1
    print(f"recall {found / planted:.2f}, precision {right / found:.3f} of {planted}")
    assert found / planted > 0.6 and right / found > 0.95


@pytest.mark.parametrize(
    "text",
    [
        "Recieve and Beleive are names here.",
        "the word recieve stands twice, and recieve is meant",
        "call recieve() or x_recieve or recieve2 or self.recieve",
        "    recieve the parcel in code",
        "a = recieve the parcel",
        "see https://example.org/recieve or recieve/this or half-recieve",
        "我们 recieve中文",
        "the colour of a neighbour",
        "the color of a neighbor",
        "favorite theater in centimeters",
        "retokenising untruncated rereadable",
        "zqxvy wuxing",
        "",
    ],
)
def test_what_is_not_touched(spelling, text):
    assert spelling.text(text, []) == text


def test_changes_are_counted_and_shown(tmp_path):
    pytest.importorskip("symspellpy")
    (tmp_path / "t.txt").write_text("They will recieve the goverment letter tomorrow.\n")
    figures = build_corpus([str(tmp_path / "t.txt")], tmp_path / "c", heldout=0.0, steps=("spelling",))
    assert figures["counts"]["words_respelled"] == 2 and figures["counts"]["documents_respelled"] == 1
    (shown,) = figures["changes_samples"]["spelling"]
    assert shown["text"] == "recieve → receive, goverment → government"
    card = (tmp_path / "c" / "README.md").read_text()
    assert "recieve → receive" in card and "| spelling | 1 | 50 |" in card


def test_other_languages_pass_and_may_bring_a_dictionary(tmp_path):
    pytest.importorskip("symspellpy")
    german = Document(id="d", text="Wir werden morgen zusamen gehen", source="s", lang="de")
    assert list(make_step("spelling")([german], Tally())) == [german]
    (tmp_path / "de.txt").write_text("zusammen 90000\nwerden 80000\nmorgen 70000\ngehen 60000\n")
    step = Spelling(f"de:{tmp_path / 'de.txt'}")
    (found,) = step([german], Tally())
    assert found.text == "Wir werden morgen zusammen gehen"
    chat = [{"role": "user", "content": "They recieve it"}]
    (found,) = make_step("spelling")([Document(id="c", text="They recieve it", source="s", messages=chat)], Tally())
    assert found.messages == [{"role": "user", "content": "They receive it"}] and found.text == "They receive it"
    for lang in ("EN", "en-US", "English", "und"):
        (found,) = make_step("spelling")([Document(id="c", text="They recieve it", source="s", lang=lang)], Tally())
        assert found.text == "They receive it"
    with pytest.raises(ConfigError, match="LANG:FILE"):
        Spelling("de")
    with pytest.raises(DataError, match="does not exist"):
        Spelling("de:none.txt")
