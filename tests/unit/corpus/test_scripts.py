"""Scripts beside Latin: vowel signs, joiners and Han signs of other languages survive the steps and tell words apart."""

from __future__ import annotations

import random

import pytest

from luban.corpus.document import Document
from luban.corpus.steps import make_step
from luban.corpus.tally import Tally

CONSONANTS, VOWELS = "कखगघचछजझतथदधनपफबमयरलवशसह", "ािीुूेैोौ"
ZWNJ, ZWJ, ZWSP = "\u200c", "\u200d", "\u200b"


def hindi(rng: random.Random, count: int) -> list[str]:
    """Words of consonants with vowel signs."""
    return [
        "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(2, 4))) for _ in range(count)
    ]


def other_vowels(rng: random.Random, text: str) -> str:
    """The same consonants with other vowel signs."""
    return "".join(rng.choice([v for v in VOWELS if v != c]) if c in VOWELS else c for c in text)


def run(spec: str, texts: list[str], lang: str | None = None) -> list[str]:
    documents = [Document(id=str(i), text=t, source="s", lang=lang) for i, t in enumerate(texts)]
    return [document.text for document in make_step(spec)(documents, Tally())]


@pytest.mark.parametrize("step", ["minhash", "bloom", "overlap"])
def test_texts_that_differ_in_vowel_signs_are_no_duplicates(step):
    rng = random.Random(4)
    texts = [" ".join(hindi(rng, 300)) for _ in range(5)]
    texts += [other_vowels(rng, text) for text in texts]
    assert run(step, [*texts, texts[0]]) == texts


def test_an_evaluation_set_is_not_found_in_other_words(tmp_path):
    rng = random.Random(5)
    items = [" ".join(hindi(rng, 20)) for _ in range(5)]
    (tmp_path / "set.txt").write_text("\n".join(items), encoding="utf-8")
    documents = [" ".join([*hindi(rng, 100), other_vowels(rng, item), *hindi(rng, 100)]) for item in items]
    assert run(f"contamination={tmp_path / 'set.txt'}", documents) == documents
    leaking = " ".join([*hindi(rng, 100), items[0], *hindi(rng, 100)])
    assert leaking not in run(f"contamination={tmp_path / 'set.txt'}", [leaking])


def test_a_listed_word_is_not_found_inside_another(tmp_path):
    page = "\n".join(["This line reads like a sentence of many words."] * 3)
    (tmp_path / "bad").write_text("cafe\nकि\n", encoding="utf-8")
    for word, kept in (("cafe", False), ("cafe\u0301s", True), ("की", True), ("कि", False), ("किताब", True)):
        assert bool(run(f"c4={tmp_path / 'bad'}", [f"{page}\nNow one more {word} is in this line."])) is kept, word


def test_a_word_with_an_accent_as_a_mark_is_no_slip():
    pytest.importorskip("symspellpy")
    text = "They went to the cafeteri\u0301a together"
    assert run("spelling", [text, "They recieve it"]) == [text, "They receive it"]


@pytest.mark.parametrize(
    "text",
    [
        f"می{ZWNJ}خواهم کتاب{ZWNJ}ها را",
        f"क्{ZWJ}ष और क्{ZWNJ}ष",
        f"ශ්{ZWJ}රී ලංකාව",
        f"👩{ZWJ}👩{ZWJ}👧 🏳\ufe0f{ZWJ}🌈",
        f"ភាសា{ZWSP}ខ្មែរ",
        f"ภาษา{ZWSP}ไทย",
        "\u200fעברית\u200e",
    ],
)
def test_signs_that_scripts_need_stay(text):
    assert run("normalise=invisible", [text]) == [text]


def test_invisible_signs_that_no_script_needs_go():
    assert run("normalise=invisible", [f"\ufeffa{ZWSP}b\u2060c\u00ad中{ZWSP}文\x00"]) == ["abc中文"]


def test_indentation_stays_where_spaces_are_joined():
    code = "def f(x):\n    if  x:\n\t\treturn  1   \n\n\n\n    return 2"
    assert run("normalise=spaces", [code]) == ["def f(x):\n    if x:\n\t\treturn 1\n\n    return 2"]
    assert run("normalise=spaces", ["　　春眠  不觉晓 \n  \n \t \n x"]) == ["春眠 不觉晓\n\n x"]


JAPANESE = "東京都は日本の首都であり、漢字で書くと圖書館のように旧い字も残る。"
KOREAN = "한국의 漢字 文化는 오래되었다. 圖書館"


@pytest.mark.parametrize(
    "text, lang",
    [
        (JAPANESE, None),
        (JAPANESE, "ja"),
        (KOREAN, None),
        ("圖書館、漢字、發見", "ja"),
        ("圖書館", "ja-JP"),
        ("圖書館", "KO"),
        ("圖書館", "jpn"),
        ("圖書館", "Japanese"),
        (f"{JAPANESE}\n圖書館\n漢字", None),
    ],
)
def test_han_signs_of_other_languages_are_not_converted(text, lang):
    assert run("chinese=t2s", [text], lang) == [text]


@pytest.mark.parametrize("lang", [None, "zh", "zh-TW", "zh_Hant", "ZH", "yue", "python", "en"])
def test_chinese_is_converted_wherever_it_stands(lang):
    line = "我們在「圖書館」閱讀漢語書籍，並且討論發現的問題。"
    plain = "我们在「图书馆」阅读汉语书籍，并且讨论发现的问题。"
    assert run("chinese=t2s", [line], lang) == [plain]
    assert run("chinese=t2s", [f"{line}ＣＤ「の」"], lang) == [f"{plain}ＣＤ「の」"]  # one kana makes no Japanese


def test_a_japanese_line_stays_in_a_chinese_text():
    line = "我們在圖書館閱讀漢語書籍，並且討論發現的問題，然後寫下來給大家看。" * 10
    quoted = "彼は「圖書館で漢字を讀む」と言つた。"
    assert run("chinese=t2s", [f"{line}\n{quoted}\n{line}"])[0].split("\n")[1] == quoted


def test_each_message_is_judged_alone():
    messages = [{"role": "user", "content": JAPANESE}, {"role": "assistant", "content": "漢語與頭髮"}]
    (found,) = make_step("chinese=t2s")([Document(id="m", text="", source="s", messages=messages)], Tally())
    assert [m["content"] for m in found.messages] == [JAPANESE, "汉语与头发"]
