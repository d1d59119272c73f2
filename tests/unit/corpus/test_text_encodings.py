"""Text that is not UTF-8 is converted and counted, and long lines are divided between words, never inside a character."""

from __future__ import annotations

import codecs
import gzip
import json
import random

import pytest

from luban.core.errors import DataError
from luban.corpus.build import build_corpus
from luban.corpus.sources import find_sources
from luban.corpus.sources.charsets import detect
from luban.corpus.sources.text import LONGEST_LINE, WORD
from luban.corpus.tally import Tally

pytest.importorskip("chardetng_py")

TEXTS = {
    "gb18030": "请联系我们。这是一个关于自然语言处理的句子,我们在这里写一些中文文字。\n",
    "big5hkscs": "請聯繫我們。這是一個關於自然語言處理的句子,我們在這裡寫一些中文文字。\n",
    "cp932": "これは日本語の文章です。自然言語処理についての短い文を書きます。\n",
    "euc_jp": "これは日本語の文章です。自然言語処理についての短い文を書きます。\n",
    "iso2022_jp": "これは日本語の文章です。自然言語処理についての短い文を書きます。\n",
    "cp949": "이것은 한국어 문장입니다. 자연어 처리에 대한 짧은 글을 씁니다.\n",
    "cp1251": "Это предложение на русском языке. Оно рассказывает о словах и книгах.\n",
    "koi8-r": "Это предложение на русском языке. Оно рассказывает о словах и книгах.\n",
    "latin-1": "Die Größe der Bäume überrascht. L'élève était très étonné par la forêt.\n",
    "cp1252": "It’s a “smart” quote – and naïve café prose, as word processors write it.\n",
    "utf-16-le": "Words and 文字 in a file that Windows calls Unicode.\n",
    "utf-16-be": "Words and 文字 in a file that Windows calls Unicode.\n",
    "utf-32-le": "Words and 文字 in an even wider file.\n",
}
MARKS = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE, "utf-32-le": codecs.BOM_UTF32_LE}


def read(path, divide=False):
    tally = Tally()
    (source,) = find_sources([str(path)])
    parts = source.parts(tally) if divide else [source]
    return [d for part in parts for d in part.documents(tally, 0, 0.0)], tally


@pytest.mark.parametrize("codec", TEXTS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.tex", "a.py"])
def test_files_in_other_encodings_are_converted(tmp_path, codec, name):
    text = "\\section{One}\nASCII first.\n" * (1 if name == "a.tex" else 40) + TEXTS[codec] * 30
    data = MARKS.get(codec, b"") + text.encode(codec)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    found, tally = read(tmp_path / name)
    assert "".join(d.text for d in found).strip() == text.strip() and not tally.unusable
    if codec not in MARKS and codec != "iso2022_jp":
        (key,) = [key for key in tally.counts if key.startswith("texts_converted_from_")]
        assert tally.counts[key] == len(found) and "invalid_utf8_replaced" not in tally.counts


@pytest.mark.parametrize("codec", ["gb18030", "cp932", "latin-1", "utf-16-le"])
def test_json_lines_in_other_encodings_are_converted(tmp_path, codec, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.jsonl.PART_BYTES", 2000)
    texts = [TEXTS[codec] + str(number) for number in range(60)]
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_bytes(MARKS.get(codec, b"") + rows.encode(codec))
    assert [d.text for d in read(tmp_path / "a.jsonl", divide=True)[0]] == texts


def test_a_long_text_keeps_its_encoding_through_all_pieces(tmp_path):
    rng = random.Random(1)
    text = "".join(TEXTS["gb18030"] + "\n" * rng.randint(0, 2) for _ in range(9000))
    assert len(text.encode("gb18030")) > 2 * 256 * 1024
    (tmp_path / "a.txt").write_bytes(text.encode("gb18030"))
    found, tally = read(tmp_path / "a.txt")
    assert len(found) > 10 and "".join(d.text for d in found).replace("\n", "") == text.replace("\n", "")
    assert tally.counts["texts_converted_from_gb18030"] == len(found)


def test_damage_in_utf8_is_not_taken_for_another_encoding(tmp_path):
    data = (TEXTS["gb18030"] * 20).encode() + b"\xff broken \xe4\xb8"
    (tmp_path / "a.txt").write_bytes(data)
    found, tally = read(tmp_path / "a.txt")
    assert found[0].text == TEXTS["gb18030"] * 20 + "\ufffd broken \ufffd"
    assert tally.counts == {"invalid_utf8_replaced": 2}


@pytest.mark.parametrize(
    "number, of, kept", [(1, 5, True), (1, 1000, True), (10, 1000, True), (11, 1000, False), (2, 20, False)]
)
def test_a_text_with_too_many_replacement_characters_is_unusable(tmp_path, number, of, kept):
    text = "\ufffd" * number + "a" * (of - number)
    for name, data in (("a.txt", text), ("a.jsonl", json.dumps({"text": text}))):
        (tmp_path / name).write_text(data)
        found, tally = read(tmp_path / name)
        assert len(found) == kept and tally.unusable.total() == 1 - kept


def test_the_share_of_unusable_texts_refuses_a_build(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(
            "\ufffd\ufffd\ufffd broken" if number < 3 else f"A sound text {number}."
        )
    with pytest.raises(DataError, match="3 texts with too many undecodable characters, such as"):
        build_corpus([str(tmp_path)], tmp_path.parent / "out", heldout=0.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("codec", ["utf-8", "gb18030", "cp932"])
def test_long_lines_are_divided_between_words_and_characters(tmp_path, seed, codec, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.text.LONGEST_LINE", 5003)
    monkeypatch.setattr("luban.corpus.sources.text.WHOLE", 4000)
    monkeypatch.setattr("luban.corpus.sources.text.PIECE", 1500)
    rng = random.Random(seed)
    sentence = (
        "请联系我们 这是一个关于 自然语言处理的 句子 我们在这里 写一些 中文文字"
        if codec == "gb18030"
        else "これは 日本語の 文章です 自然言語 処理についての 短い文を 書きます"
    )
    words = rng.choices(sentence.split(), k=6000)
    text = "".join(word + rng.choice([" ", " ", "\n\n" if rng.random() < 0.001 else " "]) for word in words)
    (tmp_path / "a.txt").write_bytes(text.encode(codec))
    found, tally = read(tmp_path / "a.txt")
    assert len(found) > 10 and "".join(d.text for d in found) == text and not tally.unusable
    assert all(d.text[-1].isspace() for d in found) and "invalid_utf8_replaced" not in tally.counts
    assert max(len(d.text.encode(codec)) for d in found) < 5003 + 3 * WORD


def test_a_line_of_prose_without_white_space_is_cut_at_a_sentence_or_a_character(tmp_path):
    for sentence in ("这是一个句子。", "字"):
        text = sentence * (3 * LONGEST_LINE // len(sentence.encode()))
        (tmp_path / "a.txt").write_text(text)
        found, tally = read(tmp_path / "a.txt")
        assert 3 <= len(found) <= 4 and "".join(d.text for d in found) == text and not tally.counts
        assert all(d.text.endswith(sentence) for d in found[:-1])


def test_rows_longer_than_a_line_are_read_up_to_the_bound(tmp_path, monkeypatch):
    texts = ["字" * LONGEST_LINE, "short", "x" * (3 * LONGEST_LINE) + "é", "last"]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    found, tally = read(tmp_path / "a.jsonl")
    assert [d.text for d in found] == texts and not tally.unusable
    size = len(rows[2].encode()) + 1
    for bound in (size, size - 1):  # with its line end, the third row is as long as the first bound allows
        monkeypatch.setattr("luban.corpus.sources.jsonl.LONGEST_ROW", bound)
        found, tally = read(tmp_path / "a.jsonl")
        assert [d.text for d in found] == texts[: None if bound == size else 2] + ["last"] * (bound < size)
        assert tally.unusable.total() == (bound < size)


def test_long_rows_stay_whole_where_a_file_is_divided(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.jsonl.PART_BYTES", 3000)
    monkeypatch.setattr("luban.corpus.sources.text.LONGEST_LINE", 101)
    monkeypatch.setattr("luban.corpus.sources.jsonl.LONGEST_ROW", 20_000)
    rng = random.Random(2)
    texts = ["é" * rng.choice([1, 40, 700, 4000, 12_000]) + str(number) for number in range(80)]
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    for name in ("a.jsonl", "b.jsonl.gz"):
        found, tally = read(tmp_path / name, divide=True)
        assert [d.text for d in found] == [text for text in texts if len(text) < 12_000]
        assert tally.unusable["oversized JSON lines"] == sum(len(text) > 12_000 for text in texts)


SHORT = {
    "gb18030": ["你好世界", "第一章 总则", "他说：“好。”", "春眠不觉晓，处处闻啼鸟。", "Python 是一种语言"],
    "big5hkscs": ["春眠不覺曉，處處聞啼鳥。", "第一章 總則"],
    "cp932": ["こんにちは世界", "東京都"],
    "euc_jp": ["これはテストです。"],
    "cp949": ["안녕하세요 세계"],
    "cp1251": ["Привет, мир!"],
    "koi8-r": ["Война и мир."],
    "latin-1": ["El niño come una manzana.", "Größe", "Über allen Gipfeln ist Ruh", "Ça va très bien, merci.", "25°C"],
    "cp1252": ["“Hello” – she said…", "It’s 5 €", "It sold for £5 in all – a bargain."],
}


@pytest.mark.parametrize("codec, text", [(codec, text) for codec, texts in SHORT.items() for text in texts])
def test_short_texts_are_detected(codec, text):
    assert text.encode(codec).decode(detect(text.encode(codec))) == text
