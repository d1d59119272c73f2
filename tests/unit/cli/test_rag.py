"""`luban rag …` through the command line's own function."""

from __future__ import annotations

import json

import pytest
from indexes import squad_file

from luban.cli.main import main


@pytest.fixture
def index(tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.md").write_text("# Join\n\nos.path.join joins components.\n\n# Split\n\nos.path.split splits them.\n")
    (notes / "empty.md").write_text("")
    (notes / "page.html").write_text(
        "<html><title>Basil</title><body><p>Basil is a herb of the mint family.</p></body></html>"
    )
    command = [
        "rag",
        "index",
        str(notes),
        "--out",
        str(tmp_path / "index"),
        "--encoder",
        "bm25",
        "--passages",
        "headings",
    ]
    assert main(command) == 0
    capsys.readouterr()
    return tmp_path / "index"


def found(capsys, *words):
    assert main(["rag", "search", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_search_prints_where_passages_stand(index, tmp_path, capsys):
    (first, *_) = found(capsys, str(index), "splits", "--k", "1")
    assert set(first) == {"score", "title", "text", "source", "start", "stop"}
    text = (tmp_path / "notes" / "a.md").read_text()
    assert first["source"] == "notes/a.md" and text[first["start"] : first["stop"]] == first["text"]
    assert first["title"] == "a.md > Split"
    assert found(capsys, str(index), "mint herb")[0]["title"] == "Basil"
    assert found(capsys, str(index), "zebra") == []
    assert main(["rag", "search", str(index), "join"]) == 0
    assert "1. a.md > Join" in capsys.readouterr().out


def test_documents_are_added_and_removed(index, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("Zebras have stripes.")
    assert main(["rag", "index", str(tmp_path / "more.txt"), "--out", str(index), "--add"]) == 0
    assert [row["source"] for row in found(capsys, str(index), "zebras")] == ["more.txt"]
    assert main(["rag", "index", "--out", str(index), "--remove", "notes/*"]) == 0
    assert found(capsys, str(index), "mint") == []


def test_eval_prints_a_row_a_method(tmp_path, capsys):
    file = squad_file(tmp_path)
    out = tmp_path / "index"
    assert main(["rag", "index", str(file), "--out", str(out), "--encoder", "bm25", "--passages", "document"]) == 0
    capsys.readouterr()
    assert main(["rag", "eval", str(out), str(file)]) == 0
    assert "bm25" in (shown := capsys.readouterr().out) and "100.0%" in shown
    assert main(["rag", "eval", str(out), str(file), "--json", "--k", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["top_1"] == 1


def test_ask_prints_an_answer_with_citations(index, tiny_checkpoint, capsys):
    command = [
        "rag",
        "ask",
        str(index),
        str(tiny_checkpoint),
        "What is basil?",
        "--k",
        "1",
        "--max-tokens",
        "2",
        "--json",
    ]
    assert main(command) == 0
    assert {"answer", "citations"} <= set(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "INDEX", "x", "--k", "0"], "at least 1"),
        (["search", "INDEX", ""], "empty query"),
        (["search", "INDEX", "x", "--retriever", "dense"], "no dense vectors"),
        (["search", "missing", "x"], "does not exist"),
        (["index", "--out", "new"], "nothing to index"),
        (["index", "missing.txt", "--out", "new"], "does not exist"),
        (["index", "INDEX/manifest.json", "--out", "INDEX", "--encoder", "bm25"], "finished index"),
        (["index", "--out", "INDEX", "--add"], "name both or neither"),
        (["index", "INDEX", "--out", "new", "--tokenizer", "t"], "a corpus is needed"),
        (["eval", "INDEX", "missing.json"], "not a file"),
        (["nothing"], "unknown 'rag nothing'"),
    ],
)
def test_what_is_refused_is_said_in_one_line(index, capsys, words, said):
    assert main(["rag", *(word.replace("INDEX", str(index)) for word in words)]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("luban: ")


@pytest.mark.parametrize("verb", ["index", "search", "ask", "eval"])
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["rag", verb, "--help"])
    assert ended.value.code == 0 and f"luban rag {verb} " in capsys.readouterr().out.partition("Examples")[2]
