"""Everything that the world's files do to a reader, in one folder: counted, named, never fatal below the set share."""

from __future__ import annotations

import builtins
import bz2
import gzip
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from luban.core.errors import DataError
from luban.corpus.build import build_corpus
from luban.corpus.reader import read_corpus
from luban.corpus.sources import find_sources
from luban.corpus.tally import Tally

ROOT = Path(__file__).parents[3]
GOOD = 60


def bad_folder(root: Path) -> Path:
    """GOOD documents among every kind of bad one."""
    root.mkdir()
    for number in range(GOOD):
        (root / f"good{number:02d}.txt").write_text(f"A good text, number {number}, that stays.")
    rows = "".join(json.dumps({"text": os.urandom(30).hex()}) + "\n" for _ in range(3000)).encode()
    packed = gzip.compress(rows)
    (root / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    (root / "flipped.jsonl.gz").write_bytes(flipped)
    member = gzip.compress(b'{"text": "first member, sound"}\n')
    (root / "members.jsonl.gz").write_bytes(member + b"\x1f\x8b\x08garbage")
    (root / "page.html.gz").write_bytes(gzip.compress(b"<p>A page</p>" * 500)[:40])
    (root / "paper.tex.gz").write_bytes(gzip.compress(b"\\section{A} text " * 500)[:40])
    (root / "cut.warc").write_bytes(b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 5000\r\n\r\nshort")
    (root / "rows.jsonl").write_text(
        '{"text": "a good row"}\n{"text": }\n[1, 2]\n{"body": "x"}\n{"text": ""}\n{"text": "null \\u0000 byte"}\n'
    )
    (root / "nulls.txt").write_bytes(b"text\0with\0zeros")
    (root / "empty.txt").write_bytes(b"")
    (root / "blank.txt").write_bytes(b" \n\n\t\n")
    (root / "pages-dump.xml.bz2").write_bytes(bz2.compress(b"<mediawiki><page>" + b"a" * (3 << 20)))
    (root / "bomb.txt.gz").write_bytes(gzip.compress(b"\n" + b"0" * (8 << 20)))
    (root / "broken.parquet").write_bytes(b"PAR1 not really")
    (root / "loop").mkdir()
    (root / "loop" / "back").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "dangling").symlink_to(root / "nothing")
    os.mkfifo(root / "pipe.txt")
    (root / "secret.txt").write_text("not to be read")
    return root


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.text.LARGEST_UNPACKED", 1 << 20)
    monkeypatch.setattr("luban.corpus.sources.text.LONGEST_LINE", 1 << 18)
    monkeypatch.setattr("luban.corpus.sources.xml.LARGEST_ELEMENT", 2 << 20)
    made = bad_folder(tmp_path / "in")
    plain = builtins.open

    def guarded(file, *args, **kwargs):  # root may read everything, so the refusal is played
        if str(file).endswith("secret.txt"):
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr(io, "open", guarded)
    return made


def test_every_kind_is_counted_and_the_good_documents_stay(folder, tmp_path):
    for package in ("fastwarc", "resiliparse", "mwparserfromhell"):
        pytest.importorskip(package)
    figures = build_corpus([str(folder)], tmp_path / "c", heldout=0.0, bad_share=0.5)
    texts = {d.text for d in read_corpus(tmp_path / "c")}
    assert {f"A good text, number {i}, that stays." for i in range(GOOD)} <= texts
    assert {"a good row", "null \0 byte", "first member, sound"} <= texts and "not to be read" not in texts
    unusable = figures["unusable"]
    assert unusable["damaged compressed files"] == 5 and unusable["invalid JSON lines"] >= 2
    assert unusable["rows without 'text' or 'messages'"] >= 1 and figures["counts"]["empty_rows_skipped"] >= 1
    assert unusable["suspicious compressed files"] == 1 and unusable["oversized XML elements"] == 1
    assert unusable["unreadable files"] == 1 and unusable["files without documents"] >= 4
    assert figures["counts"]["binary_files_skipped"] == 1 and figures["counts"]["folder_links_skipped"] == 1
    samples = figures["unusable_samples"]
    assert any("secret.txt" in name for name in samples["unreadable files"]) and all(
        len(v) <= 3 for v in samples.values()
    )
    assert "damaged compressed files" in (tmp_path / "c" / "README.md").read_text()


def test_past_the_share_nothing_is_written(folder, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=r"records of the input are unusable.*--bad-share"):
        build_corpus([str(folder)], tmp_path / "c", heldout=0.0, bad_share=0.001)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_line_of_100_megabytes_takes_little_memory(tmp_path):
    with open(tmp_path / "long.jsonl", "w") as file:
        file.write('{"text": "' + "a" * 100_000_000 + '"}\n{"text": "short"}\n')
    with open(tmp_path / "long.txt", "w") as file:
        file.write("b" * 100_000_000)
    code = f"""
import resource
from luban.corpus.build import build_corpus
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = build_corpus([{str(tmp_path / "long.jsonl")!r}, {str(tmp_path / "long.txt")!r}], {str(tmp_path / "c")!r},
                     heldout=0.0, steps=("exact",), bad_share=0.9)
print(found["unusable"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "'oversized JSON lines': 1" in done.stdout
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    assert int(done.stdout.split()[-1]) * unit < 300 << 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the child's peak is its own


def test_a_compressed_file_is_divided_like_a_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.jsonl.PART_BYTES", 3000)
    monkeypatch.setattr("luban.corpus.sources.jsonl.MOST_PACKED", 7)
    rows = "".join(
        json.dumps({"text": "é" * (i % 50 + 1) + str(i)}, ensure_ascii=False) + "\n" for i in range(900)
    ).encode()
    (tmp_path / "a.jsonl").write_bytes(rows)
    half = rows.index(b"\n", len(rows) // 2) + 1
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows[:half]) + gzip.compress(rows[half:]))  # two members

    def texts(name: str, divide: bool) -> tuple[list[str], int, Tally]:
        (source,) = find_sources([str(tmp_path / name)])
        tally = Tally()
        sources = source.parts(Tally()) if divide else [source]
        return [d.text for s in sources for d in s.documents(tally, 0, 0.0)], len(sources), tally

    plain, packed = texts("a.jsonl", True), texts("b.jsonl.gz", True)
    assert plain[0] == packed[0] == texts("b.jsonl.gz", False)[0] and len(packed[0]) == 900
    assert packed[1] == 7 < plain[1]
    damaged = gzip.compress(rows + os.urandom(20000))
    (tmp_path / "c.jsonl.gz").write_bytes(damaged[: len(damaged) - 5000])
    found, parts, tally = texts("c.jsonl.gz", True)
    assert parts == 7 and 0 < len(found) <= 900 and found == plain[0][: len(found)]
    assert tally.unusable["damaged compressed files"] == 1  # once, not once a part


def test_sources_that_cannot_be_read_are_refused_in_one_line(tmp_path, monkeypatch):
    plain = builtins.open

    def guarded(file, *args, **kwargs):
        if "secret" in str(file):
            raise PermissionError(13, "Permission denied", str(file))
        return plain(file, *args, **kwargs)

    names = (
        "secret.txt",
        "secret.jsonl",
        "secret.csv",
        "secret.json",
        "secret.html",
        "secret.tex",
        "secret.warc",
        "secret.jsonl.gz",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"not to be read")
    monkeypatch.setattr(builtins, "open", guarded)
    monkeypatch.setattr(io, "open", guarded)
    for name in names:
        with pytest.raises(DataError, match=rf"{name} cannot be read: Permission denied"):
            build_corpus([f"{tmp_path / name}"], tmp_path / "c", heldout=0.0)
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob("*.incomplete"))


def test_files_that_cannot_be_looked_at_are_counted(tmp_path, monkeypatch):
    for name in ("good.txt", "bad.txt", "LICENSE"):
        (tmp_path / name).write_text("text")
    plain = Path.is_dir

    def guarded(path):
        if path.name == "bad.txt":
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(Path, "is_dir", guarded)
    (source,), tally = find_sources([str(tmp_path)]), Tally()
    assert [Path(d.id).name for d in source.documents(tally, 0, 0.0)] == ["LICENSE", "good.txt"]
    assert tally.unusable == {"unreadable files": 1}


def test_numbers_that_a_database_cannot_hold(tmp_path):
    pytest.importorskip("resiliparse")
    scores = ["9" * 40, "-" + "9" * 40, "x", "3"]
    answers = "".join(
        f'<row Id="{i}" PostTypeId="2" ParentId="0" Score="{s}" Body="answer {i}"/>' for i, s in enumerate(scores, 1)
    )
    (tmp_path / "Posts.xml").write_text(f'<posts><row Id="0" PostTypeId="1" Title="Why?" Body="So"/>{answers}</posts>')
    (source,) = find_sources([str(tmp_path / "Posts.xml")])
    (document,) = source.documents(Tally(), 0, 0.0)
    assert document.meta["answer_scores"] == [3, 0, 0, 0] and document.text.startswith(
        "Question: Why?\n\nSo\n\nAnswer: answer 4"
    )
