"""Files by their endings, in any case and compression: rows are read as rows, never as raw text."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pyarrow as pa
import pytest

from luban.core.errors import DataError
from luban.corpus.sources import find_sources
from luban.corpus.sources.json_array import elements
from luban.corpus.sources.kinds import kind_of
from luban.corpus.tally import Tally


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zstd,
    ".GZ": gzip.compress,
}
TEXTS = ["one, with a comma", 'two "quoted"', "three\nlines; é 字\ttab", "four"]


def rows(kind: str, texts=TEXTS) -> bytes:
    if kind == "csv":
        table = io.StringIO()
        csv.writer(table).writerows([["id", "text", "quality"], *([i, text, 0.5] for i, text in enumerate(texts))])
        return table.getvalue().encode()
    if kind == "tsv":
        return (
            "id\ttext\n" + "".join(f'{i}\t"{t.replace(chr(34), chr(34) * 2)}"\n' for i, t in enumerate(texts))
        ).encode()
    values = [{"text": text, "id": i} for i, text in enumerate(texts)]
    return (json.dumps(values, indent=2) if kind == "json" else "\n".join(map(json.dumps, values))).encode()


def read(path, divide=False, **options):
    tally = Tally()
    (source,) = find_sources([str(path)], **options)
    parts = source.parts(tally) if divide else [source]
    return [d for part in parts for d in part.documents(tally, 0, 0.0)], tally


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_rows_in_every_format_and_compression(tmp_path, kind, packed):
    for name in (f"a.{kind}{packed}", f"A.{kind.upper()}{packed.upper()}"):
        (tmp_path / name).write_bytes(PACK[packed](rows(kind)))
        found, tally = read(tmp_path / name)
        assert [d.text for d in found] == TEXTS and not tally.unusable
        assert [d.id for d in found] == [f"{name}#{i}" for i in range(4)]


@pytest.mark.parametrize("packed", PACK)
def test_compressed_json_lines_are_divided(tmp_path, packed, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.jsonl.PART_BYTES", 2000)
    texts = [f"text {i} " + "é" * (i % 30) for i in range(300)]
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACK[packed](rows("jsonl", texts)))
    assert [d.text for d in read(tmp_path / f"a.jsonl{packed}", divide=True)[0]] == texts


@pytest.mark.parametrize("packed", [name for name in PACK if name])
def test_damaged_compressed_files_are_counted(tmp_path, packed):
    rng = random.Random(1)
    texts = ["".join(rng.choices("abcdefghij", k=100)) for _ in range(12_000)]
    data = PACK[packed](rows("jsonl", texts))
    (tmp_path / f"a.jsonl{packed}").write_bytes(data[: len(data) * 3 // 4])
    found, tally = read(tmp_path / f"a.jsonl{packed}", divide=True)
    assert [d.text for d in found] == texts[: len(found)] and 500 < len(found) < 12_000
    assert tally.unusable["damaged compressed files"] == 1


def test_a_folder_in_mixed_case_and_compression(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    (root / "A.JSONL").write_bytes(rows("jsonl"))
    (root / "B.HTML").write_text(
        "<html><body><article><p>" + "A page with words. " * 30 + "</p></article></body></html>"
    )
    (root / "c.Csv").write_bytes(rows("csv"))
    (root / "d.json").write_bytes(rows("json"))
    (root / "e.json").write_text('{"name": "a package", "version": 1}')
    (root / "f.txt.xz").write_bytes(lzma.compress(b"packed prose"))
    (root / "g.csv").write_text("x,y\n1,2\n")
    (root / "h.json").write_text('[{"x": 1}]')
    (root / "i.json").write_bytes(rows("jsonl"))
    (root / "J.MD").write_text("prose")
    found, tally = read(root)
    texts: dict[str, list[str]] = {}
    for document in found:
        texts.setdefault(document.id.partition("#")[0].removeprefix("in/"), []).append(document.text)
    assert {name: len(held) for name, held in texts.items()} == {
        "A.JSONL": 4,
        "B.HTML": 1,
        "c.Csv": 4,
        "d.json": 4,
        "e.json": 1,
        "f.txt.xz": 1,
        "i.json": 4,
        "J.MD": 1,
    }
    assert (
        "<p>" not in texts["B.HTML"][0]
        and texts["A.JSONL"] == texts["c.Csv"] == texts["d.json"] == texts["i.json"] == TEXTS
    )
    assert tally.counts == {"tables_without_text_skipped": 2} and not tally.unusable


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_with_any_delimiter_and_odd_rows(tmp_path, delimiter):
    table = io.StringIO()
    writer = csv.writer(table, delimiter=delimiter)
    writer.writerows([["text", "n"], ["long " * 40_000, 1], ["", 2], ["short row"], ["long row", 1, 2], ["last", 3]])
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + table.getvalue().encode())
    found, tally = read(tmp_path / "a.csv")
    assert [d.text for d in found] == ["long " * 40_000, "last"]
    assert tally.unusable == {"invalid CSV rows": 2} and tally.counts == {"empty_rows_skipped": 1}


def test_csv_with_the_line_ends_of_any_system(tmp_path):
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "a.csv").write_bytes(end.join(["id,text", "1,one", '2,"two, quoted"', "", "3,three"]).encode())
        found, tally = read(tmp_path / "a.csv")
        assert [d.text for d in found] == ["one", "two, quoted", "three"] and not tally.unusable
    (tmp_path / "a.csv").write_bytes(b'text\n"never closed\nx\n')
    assert [d.text for d in read(tmp_path / "a.csv")[0]] == ["never closed\nx\n"]


def test_rows_in_utf16_as_windows_writes_them(tmp_path):
    for kind in ("csv", "json", "jsonl"):
        (tmp_path / f"a.{kind}").write_bytes(rows(kind).decode().encode("utf-16"))
        assert [d.text for d in read(tmp_path / f"a.{kind}")[0]] == TEXTS


def test_csv_in_a_legacy_encoding(tmp_path):
    texts = ["这是一个关于自然语言处理的句子。", "我们在这里写一些中文,文字。"] * 10
    (tmp_path / "a.csv").write_bytes(rows("csv", texts).decode().encode("gb18030"))
    found, tally = read(tmp_path / "a.csv")
    assert [d.text for d in found] == texts and tally.counts["texts_converted_from_gb18030"] == 20


def test_a_table_without_text_is_refused_with_its_columns(tmp_path):
    (tmp_path / "a.csv").write_text("body,n\nx,1\n")
    (tmp_path / "b.json").write_text('[{"body": "x", "n": 1}]')
    for name in ("a.csv", "b.json"):
        with pytest.raises(
            DataError, match=r"'text' or 'messages', only body, n; --text-field NAME takes another field"
        ):
            read(tmp_path / name)
        assert [d.text for d in read(tmp_path / name, text_field="body")[0]] == ["x"]
    (tmp_path / "c.csv").write_text("text\n")
    with pytest.raises(DataError, match="no row with text"):
        read(tmp_path / "c.csv")


def test_what_json_files_hold_decides_how_they_are_read(tmp_path):
    kinds = {
        '[{"text": "a"}]': "json",
        ' \n[ \n{"a": 1}]': "json",
        '{"text": "a"}': "jsonl",
        '{"a": 1}\n{"a": 2}\n': "jsonl",
        "[1, 2]": "text",
        '{"a": 1}': "text",
        '{\n "text": "a"\n}': "text",
        "": "text",
        "no JSON": "text",
    }
    for text, kind in kinds.items():
        (tmp_path / "a.json").write_text(text)
        assert kind_of(tmp_path / "a.json") == kind, text


@pytest.mark.parametrize("seed", range(5))
def test_array_elements_agree_with_json(seed, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.json_array.CHUNK", 16)
    rng = random.Random(seed)

    def value(depth: int):
        if depth == 0 or rng.random() < 0.4:
            return rng.choice([None, True, -1.5e300, 12345678901234567890123, "", 'a"\\,]}[{', "é\u2028字", 0])
        if rng.random() < 0.5:
            return [value(depth - 1) for _ in range(rng.randint(0, 3))]
        return {str(i): value(depth - 1) for i in range(rng.randint(0, 3))}

    for _ in range(100):
        values = [value(3) for _ in range(rng.randint(0, 6))]
        text = json.dumps(values, indent=rng.choice([None, 1]), ensure_ascii=rng.random() < 0.5)
        pieces, start = [], 0
        while start < len(text):
            pieces.append(text[start : start + rng.randint(1, 9)])
            start += len(pieces[-1])
        assert list(elements(iter(pieces))) == values
        cut = text[: rng.randrange(len(text))]
        held: list = []
        with pytest.raises(ValueError):
            for element in elements(iter([cut])):
                held.append(element)
        assert held == values[: len(held)]


def test_a_damaged_array_gives_what_comes_before_the_damage(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"text": "two"}, {"text": }, {"text": "four"}]')
    found, tally = read(tmp_path / "a.json")
    assert [d.text for d in found] == ["one", "two"] and tally.unusable == {"damaged JSON arrays": 1}
    (tmp_path / "b.json").write_text('[{"text": "one"}, 3, {"text": "\\ud800"}, {"n": NaN, "text": "last"}]')
    found, tally = read(tmp_path / "b.json")
    assert [d.text for d in found] == ["one", "\ufffd", "last"] and tally.unusable == {"rows that are no objects": 1}
    monkeypatch.setattr("luban.corpus.sources.json_array.LONGEST_ROW", 1 << 21)
    (tmp_path / "c.json").write_text('[{"text": "one"}, {"text": "' + "x" * (5 << 20) + '"}]')
    found, tally = read(tmp_path / "c.json")
    assert [d.text for d in found] == ["one"] and "more than 2097152 characters" in tally.unusable_samples[
        "damaged JSON arrays"
    ][0]
