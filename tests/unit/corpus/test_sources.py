"""Sources: everything that is text is read, everything that is not is refused or counted."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luban.core.errors import DataError, UsageError
from luban.corpus.sources import find_sources
from luban.corpus.sources.text import LONGEST_LINE
from luban.corpus.tally import Tally


def read(*names):
    tally = Tally()
    found = [d for source in find_sources(list(map(str, names))) for d in source.documents(tally, 0, 0.0)]
    return found, tally.counts + tally.unusable


def test_a_folder_in_name_order_without_hidden_and_binary_files(tmp_path):
    root = tmp_path / "notes"
    (root / "b").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "x.txt").write_text("hidden")
    (root / "b" / "two.md").write_text("two")
    (root / "a.py").write_text("one = 1\n")
    (root / "c.bin").write_bytes(b"\x7fELF\0\0")
    (root / "d.txt").write_text("")
    (root / "e.jsonl").write_text('{"text": "three"}\n')
    (root / "f.jsonl").write_text('{"body": "no text"}\n')
    (root / "g.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:20])
    found, counts = read(root)
    assert [(d.id, d.text) for d in found] == [
        ("notes/a.py", "one = 1\n"),
        ("notes/b/two.md", "two"),
        ("notes/e.jsonl#000000000", "three"),
    ]
    assert counts["binary_files_skipped"] == 1
    assert counts["files without documents"] == 1
    assert counts["damaged compressed files"] == 1


def test_ids_do_not_depend_on_where_the_folder_is(tmp_path):
    for place in ("here", "there/deep"):
        (tmp_path / place / "notes").mkdir(parents=True)
        (tmp_path / place / "notes" / "a.txt").write_text("text")
    here, there = (read(tmp_path / place / "notes")[0] for place in ("here", "there/deep"))
    assert here == there
    both, _ = read(tmp_path / "here" / "notes", tmp_path / "there" / "deep" / "notes")
    assert [d.id for d in both] == ["notes/a.txt", "notes#2/a.txt"]


def test_link_loops_end(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.txt").write_text("text")
    (root / "sub" / "up").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    found, counts = read(root)
    assert [d.id for d in found] == ["root/sub/a.txt"]
    assert counts["folder_links_skipped"] == 1


def test_globs(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path / "*.txt")[0]] == ["a.txt", "b.txt"]
    with pytest.raises(DataError, match="matches no file"):
        read(tmp_path / "*.rst")


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    sound = "Größe und Äpfel, déjà vu, 你好。 " * 10
    (tmp_path / "a.txt").write_bytes(sound.encode() + b"\xff\xfe caf\xe9\r\n")
    found, counts = read(tmp_path / "a.txt")
    assert found[0].text == sound + "\ufffd\ufffd caf\ufffd\n"
    assert counts["invalid_utf8_replaced"] == 3


@pytest.mark.parametrize("data, words", [(b"", "is empty"), (b" \n", "is empty"), (b"PK\x03\x04\0\0", "is binary")])
def test_a_file_that_holds_no_text_is_refused(tmp_path, data, words):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=words):
        read(tmp_path / "a.txt")


def test_missing_and_unknown_sources_are_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(UsageError, match="did you mean 'python:stdlib'"):
        read("python:stdlb")
    with pytest.raises(UsageError, match="no source given"):
        read()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path / "empty")


def test_json_lines_good_and_bad(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.jsonl.LONGEST_ROW", LONGEST_LINE)
    rows = [
        json.dumps({"text": "one", "id": "x", "lang": "en", "quality": 0.5, "meta": {"k": 1}}),
        '{"text": ',
        "[1, 2]",
        '{"text": ""}',
        '{"messages": [{"role": "user"}]}',
        "",
        json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        '{"text": "lone \\ud800"}',
        json.dumps({"text": "y" * LONGEST_LINE}),
        '{"text": "last"}',
    ]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(rows))
    found, counts = read(tmp_path / "a.jsonl.gz")
    assert [d.text for d in found] == ["one", "q\na", "lone \ufffd", "last"]
    assert (found[0].id, found[0].lang, found[0].quality, found[0].meta) == ("a.jsonl.gz#x", "en", 0.5, {"k": 1})
    assert found[1].messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert counts["invalid JSON lines"] == 2 and counts["rows with unusable messages"] == 1
    assert counts["oversized JSON lines"] == 1 and counts["empty_rows_skipped"] == 1


def test_a_file_of_lines_that_are_too_long_is_not_called_empty(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.jsonl.LONGEST_ROW", 1 << 20)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "y" * (1 << 20)}) + "\n")
    with pytest.raises(DataError, match="only lines of more than 1 MiB"):
        read(tmp_path / "a.jsonl")


def test_a_kind_before_a_folder_reads_its_files_of_that_kind(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.jsonl", "deep/a.jsonl.gz", "deep/c.txt"):
        (tmp_path / name).write_bytes(b"x")
    found = find_sources([f"jsonl:{tmp_path}", f"text:{tmp_path}", f"code:{tmp_path}"])
    names = [(source.kind, Path(source.name).relative_to(tmp_path).as_posix()) for source in found]
    assert names == [("jsonl", "b.jsonl"), ("jsonl", "deep/a.jsonl.gz"), ("text", "deep/c.txt"), ("code", ".")]
    with pytest.raises(DataError, match="holds no file of this kind"):
        find_sources([f"parquet:{tmp_path}"])


def test_json_lines_without_a_document_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="'text' or 'messages'"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path / "b.jsonl")


def test_of_a_damaged_gzip_file_what_comes_before_the_damage_is_kept(tmp_path):
    rows = "".join(json.dumps({"text": os.urandom(20).hex()}) + "\n" for _ in range(5000))
    good = gzip.compress(rows.encode())
    (tmp_path / "a.jsonl.gz").write_bytes(good[: len(good) // 2])
    found, counts = read(tmp_path / "a.jsonl.gz")
    assert 1000 < len(found) < 4000 and counts["damaged compressed files"] == 1
    assert [d.text for d in found] == [json.loads(line)["text"] for line in rows.splitlines()[: len(found)]]
    (tmp_path / "b.jsonl.gz").write_bytes(good[:30])
    with pytest.raises(DataError, match="is empty"):
        read(tmp_path / "b.jsonl.gz")


def test_gzip_bombs_are_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.text.LARGEST_UNPACKED", 1 << 20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\n" + b"a" * (32 << 20)))
    found, counts = read(tmp_path / "a.txt.gz")
    assert sum(d.bytes for d in found) < 16 << 20 and counts["suspicious compressed files"] == 1


def test_the_parts_of_a_source_together_are_the_source(tmp_path, monkeypatch):
    for kind in ("folder", "jsonl", "parquet"):
        monkeypatch.setattr(f"luban.corpus.sources.{kind}.PART_BYTES", 3000)
    rng = random.Random(1)
    texts = ["é" * rng.randint(1, 60) for _ in range(700)]
    with open(tmp_path / "a.jsonl", "w") as file:
        file.write("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet", row_group_size=30)
    (tmp_path / "c").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "c" / f"{number}.txt").write_text(text)
    for name in ("a.jsonl", "b.parquet", "c"):
        (source,) = find_sources([str(tmp_path / name)])
        parts = source.parts(Tally())
        assert len(parts) > 5
        whole, divided = (
            [d for one in sources for d in one.documents(Tally(), 0, 0.0)] for sources in ([source], parts)
        )
        assert whole == divided and len(whole) == 700 and len({d.id for d in whole}) == 700
        assert sorted(d.text for d in whole) == sorted(texts)


def test_parquet(tmp_path):
    messages = json.dumps([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    pq.write_table(pa.table({"text": ["one", None, ""], "messages": [None, messages, None]}), tmp_path / "a.parquet")
    found, counts = read(tmp_path / "a.parquet")
    assert [d.text for d in found] == ["one", "q\na"]
    assert counts["empty_rows_skipped"] == 1
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="has no column 'text' or 'messages', only body; --text-field"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        read(tmp_path / "c.parquet")


def test_long_prose_is_divided_at_blank_lines_and_code_is_not(tmp_path):
    paragraphs = [f"paragraph {i} " + "word " * 200 + "\n\n" for i in range(400)]
    for name in ("a.txt", "a.py"):
        (tmp_path / name).write_text("".join(paragraphs))
    found, _ = read(tmp_path / "a.txt")
    assert len(found) > 10
    assert "".join(d.text for d in found) == "".join(paragraphs)
    assert all(d.text.startswith("paragraph") for d in found)
    assert len({d.id for d in found}) == len(found)
    assert len(read(tmp_path / "a.py")[0]) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_files_in_a_folder_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "b.txt").chmod(0)
    found, counts = read(tmp_path)
    assert len(found) == 1 and counts["unreadable files"] == 1
