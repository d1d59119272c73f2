"""Building: dedup, split, files with the same bytes, nothing left behind on failure."""

from __future__ import annotations

import builtins
import json

import pytest

from luban.core.artifact import open_artifact
from luban.core.errors import ArtifactError, ConfigError, DataError, MissingExtra
from luban.corpus.build import build_corpus
from luban.corpus.document import Document
from luban.corpus.reader import read_corpus
from luban.corpus.split import is_heldout
from luban.corpus.writer import SortedWriter, SplitWriter


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i % 900}", "id": i}) + "\n" for i in range(1000)))
    return path


def test_split_and_dedup_account_for_every_document(source, tmp_path):
    figures = build_corpus([str(source)], tmp_path / "c", heldout=0.1, seed=3)
    train, heldout = (list(read_corpus(tmp_path / "c", split)) for split in ("train", "heldout"))
    assert [(row["step"], row["documents"]) for row in figures["waterfall"]] == [("read", 1000), ("exact", 900)]
    assert figures["waterfall"][1]["bytes"] == figures["train"]["bytes"] + figures["heldout"]["bytes"]
    assert figures["dropped"]["exact"]["documents"] == 100
    assert len(train) + len(heldout) == 900 == len({d.text for d in train + heldout})
    assert [d.id for d in heldout] == sorted(f"in.jsonl#{i}" for i in range(900) if is_heldout(f"in.jsonl#{i}", 0.1, 3))
    assert 50 < len(heldout) < 140  # 90 ± 5 standard deviations
    assert figures["train"] == {"documents": len(train), "bytes": sum(len(d.text) for d in train)}
    assert [int(d.id.split("#")[1]) for d in train] == sorted(int(d.id.split("#")[1]) for d in train)


def test_a_document_stays_in_its_split_whatever_else_is_there(source, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("something else")
    build_corpus([str(source)], tmp_path / "a", seed=1)
    build_corpus([str(other), str(source)], tmp_path / "b", seed=1)
    first, second = ({d.id for d in read_corpus(tmp_path / name, "heldout")} for name in "ab")
    assert first == {i for i in second if i.startswith("in.jsonl")}


def test_the_same_input_gives_the_same_bytes(source, tmp_path):
    for name in ("a", "b"):
        build_corpus([str(source)], tmp_path / name, seed=1)
    assert open_artifact(tmp_path / "a").content_hash == open_artifact(tmp_path / "b").content_hash
    build_corpus([str(source)], tmp_path / "c", seed=2)
    assert open_artifact(tmp_path / "a").content_hash != open_artifact(tmp_path / "c").content_hash


def test_every_column_comes_back(tmp_path):
    messages = [{"role": "user", "content": "q \u2028 é"}, {"role": "assistant", "content": "a"}]
    row = {"id": "x", "messages": messages, "lang": "en", "quality": 0.25, "meta": {"a": [1]}}
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    build_corpus([str(tmp_path / "in.jsonl")], tmp_path / "c", heldout=0.0)
    assert list(read_corpus(tmp_path / "c")) == [
        Document(
            id="in.jsonl#x",
            text="q \u2028 é\na",
            source="in.jsonl",
            lang="en",
            quality=0.25,
            messages=messages,
            meta={"a": [1]},
            split="train",
        )
    ]
    assert list(read_corpus(tmp_path / "c", "heldout")) == []


@pytest.mark.parametrize(
    "change, error",
    [
        ({"heldout": 1.0}, ConfigError),
        ({"heldout": -0.1}, ConfigError),
        ({"steps": ("exat",)}, ConfigError),
        ({"sources": ["nowhere.txt"]}, DataError),
    ],
)
def test_a_build_that_fails_leaves_nothing(source, tmp_path, change, error):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error):
        build_corpus(**{"sources": [str(source)], "out": tmp_path / "c", **change})
    assert sorted(tmp_path.iterdir()) == before


def test_an_occupied_directory_is_refused(source, tmp_path):
    build_corpus([str(source)], tmp_path / "c")
    with pytest.raises(ArtifactError, match="finished corpus"):
        build_corpus([str(source)], tmp_path / "c")


def test_without_pyarrow_the_error_names_the_command(source, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'luban\[corpus\]'"):
        build_corpus([str(source)], tmp_path / "c")


def test_sorted_writer_spills_and_merges(tmp_path):
    documents = [Document(id=f"{i * 7919 % 1000:04d}", text="x" * 50, source="s") for i in range(1000)]
    writer = SortedWriter(tmp_path, "heldout", run_bytes=5000)
    for document in documents:
        writer.add(document)
    assert len(writer.runs) > 3
    writer.close()
    plain = SplitWriter(tmp_path, "train")
    for document in sorted(documents, key=lambda d: d.id):
        plain.add(document)
    plain.close()
    assert (tmp_path / "heldout-00000.parquet").read_bytes() == (tmp_path / "train-00000.parquet").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_large_splits_go_to_several_files(tmp_path):
    import pyarrow.parquet as pq

    writer = SplitWriter(tmp_path, "train", file_bytes=1)
    for i in range(3):
        writer.add(Document(id=str(i), text="x" * (9 << 20), source="s"))
    writer.close()
    files = sorted(tmp_path.iterdir())
    assert [f.name for f in files] == [f"train-{i:05d}.parquet" for i in range(3)]
    assert [pq.read_table(f)["id"].to_pylist() for f in files] == [["0"], ["1"], ["2"]]
