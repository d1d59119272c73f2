"""`luban rag …` through the command line's own function."""

from __future__ import annotations

import json
import shutil

import pytest
from indexes import squad_file

from luban.cli.main import main
from luban.retrieval.passages import tokens


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
    assert main(["rag", "search", str(index), "zebra"]) == 0
    assert "no passage of" in "".join(capsys.readouterr())


def test_documents_are_added_and_removed(index, tmp_path, capsys):
    (tmp_path / "more.txt").write_text("Zebras have stripes.")
    assert main(["rag", "index", str(tmp_path / "more.txt"), "--out", str(index), "--add"]) == 0
    assert [row["source"] for row in found(capsys, str(index), "zebras")] == ["more.txt"]
    assert main(["rag", "index", "--out", str(index), "--remove", "notes/*"]) == 0
    assert found(capsys, str(index), "mint") == []


def test_a_file_of_the_same_name_is_no_replacement(tmp_path, capsys):
    for name, text in (("one", "Cats purr."), ("two", "Dogs bark."), ("three", "Cows moo.")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "z.txt").write_text(text)
    index = tmp_path / "index"
    assert main(["rag", "index", str(tmp_path / "one" / "z.txt"), "--out", str(index), "--encoder", "bm25"]) == 0
    for _ in range(2):  # the second time the document is known
        assert main(["rag", "index", str(tmp_path / "two" / "z.txt"), "--out", str(index), "--add"]) == 0
    assert "1 documents added (1 in the place of an earlier one)" in (said := capsys.readouterr()).err + said.out
    sources = {row["source"]: row["text"] for row in found(capsys, str(index), "cats dogs cows")}
    assert sources == {"z.txt": "Cats purr.", "z.txt#2": "Dogs bark."}
    assert main(["rag", "index", "--out", str(index), "--remove", "z.txt"]) == 0
    assert main(["rag", "index", str(tmp_path / "three" / "z.txt"), "--out", str(index), "--add"]) == 0
    sources = {row["source"]: row["text"] for row in found(capsys, str(index), "cats dogs cows")}
    assert sources == {"z.txt": "Cows moo.", "z.txt#2": "Dogs bark."}


@pytest.mark.parametrize(
    "order", [("notes", "notes/a.md"), ("notes/a.md", "notes"), ("notes/a.md", "./notes/../notes")]
)
def test_a_file_and_the_folder_above_it_are_the_same_document(order, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "notes" / "a.md").write_text("Cats purr.")
    (tmp_path / "notes" / "deep" / "b.jsonl").write_text('{"text": "Dogs bark."}\n')
    first, second = order
    assert main(["rag", "index", first, "--out", "index", "--encoder", "bm25"]) == 0
    (tmp_path / "notes" / "a.md").write_text("Cats mew.")
    assert main(["rag", "index", second, "notes/deep/b.jsonl", "--out", "index", "--add"]) == 0
    assert main(["rag", "index", *order, first, "--out", "both", "--encoder", "bm25"]) == 0
    capsys.readouterr()
    for index in ("index", "both"):
        rows = {row["source"]: row["text"] for row in found(capsys, index, "cats dogs purr")}
        assert rows.pop("notes/a.md") == "Cats mew." and list(rows.values()) in (["Dogs bark."], [])


def test_what_a_folder_no_longer_holds_is_named_and_removed_by_sync(tmp_path, capsys):
    notes, index = tmp_path / "notes", str(tmp_path / "index")
    (notes / "deep").mkdir(parents=True)
    for name, text in (
        ("a.md", "Cats purr."),
        ("b.md", "Dogs bark."),
        ("deep/c.txt", "Cows moo."),
        ("d.md", "Hens cluck."),
    ):
        (notes / name).write_text(text)
    (tmp_path / "notes.md").write_text("Owls hoot.")
    words = "cats dogs cows hens owls"
    assert main(["rag", "index", str(notes), str(tmp_path / "notes.md"), "--out", index, "--encoder", "bm25"]) == 0
    (notes / "a.md").unlink()
    (notes / "deep" / "c.txt").unlink()
    (notes / "d.md").write_text("")
    capsys.readouterr()
    assert main(["rag", "index", str(notes), "--out", index, "--add"]) == 0
    said = capsys.readouterr().err
    assert "keeps 3 documents that notes gives no longer, such as 'notes/a.md': --sync removes them" in said
    kept = {"notes/a.md", "notes/b.md", "notes/deep/c.txt", "notes/d.md", "notes.md"}
    assert {row["source"] for row in found(capsys, index, words)} == kept
    assert main(["rag", "index", str(notes), "--out", index, "--sync"]) == 0
    said = "".join(capsys.readouterr())
    assert "1 documents added (1 in the place of an earlier one), 3 removed" in said and "keeps" not in said
    assert {row["source"] for row in found(capsys, index, words)} == {"notes/b.md", "notes.md"}
    assert main(["rag", "index", "--out", index, "--sync"]) == 2
    assert "name both or neither" in capsys.readouterr().err


def test_documents_of_two_corpora_with_the_same_ids_are_said_to_be_one(tmp_path, capsys):
    for name, animals in (("one", "Cats Dogs"), ("two", "Cows Hens Owls")):
        rows = [{"id": str(number), "text": f"{animal} sleep."} for number, animal in enumerate(animals.split())]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(["corpus", "build", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / name)]) == 0
    one, two, index = str(tmp_path / "one"), str(tmp_path / "two"), str(tmp_path / "index")
    assert main(["rag", "index", one, "--out", index, "--encoder", "bm25"]) == 0
    capsys.readouterr()
    assert main(["rag", "index", one, "--out", index, "--add"]) == 0  # the same corpus again
    assert "take the place" not in capsys.readouterr().err
    assert main(["rag", "index", two, "--out", index, "--add"]) == 0
    said = capsys.readouterr().err
    assert "2 documents of two take the place of documents with the same ids" in said and "those of one" in said
    assert {row["text"] for row in found(capsys, index, "sleep")} == {"Cows sleep.", "Hens sleep.", "Owls sleep."}
    assert main(["rag", "index", one, two, "--out", str(tmp_path / "both"), "--encoder", "bm25"]) == 0
    assert "2 documents have ids that others have" in capsys.readouterr().err
    assert len(found(capsys, str(tmp_path / "both"), "sleep")) == 5


def test_rows_that_a_file_lost_are_gone(tmp_path, capsys):
    rows, index = tmp_path / "rows.jsonl", tmp_path / "index"
    rows.write_text("".join(json.dumps({"text": f"{animal} sleep."}) + "\n" for animal in ("Cats", "Dogs", "Cows")))
    assert main(["rag", "index", str(rows), "--out", str(index), "--encoder", "bm25"]) == 0
    rows.write_text(json.dumps({"text": "Hens sleep."}) + "\n")
    assert main(["rag", "index", str(rows), "--out", str(index), "--add"]) == 0
    assert "1 documents added (3 in" in "".join(capsys.readouterr())
    assert [row["text"] for row in found(capsys, str(index), "sleep")] == ["Hens sleep."]


def test_a_folder_that_has_moved_keeps_its_name(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("Cats purr.")
    index = tmp_path / "index"
    assert main(["rag", "index", str(tmp_path / "notes"), "--out", str(index), "--encoder", "bm25"]) == 0
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "notes").rename(tmp_path / "elsewhere" / "notes")
    (tmp_path / "elsewhere" / "notes" / "a.md").write_text("Cats mew.")
    assert main(["rag", "index", str(tmp_path / "elsewhere" / "notes"), "--out", str(index), "--add"]) == 0
    capsys.readouterr()
    assert {row["source"]: row["text"] for row in found(capsys, str(index), "cats")} == {"notes/a.md": "Cats mew."}


def test_documents_are_added_with_the_tokenizer_that_divided_the_others(tmp_path, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, "model")
    (tmp_path / "a.txt").write_text("Cats purr.")
    command = ["rag", "index", "a.txt", "--encoder", "bm25", "--passages", "tokens", "--tokenizer", "model"]
    assert main([*command, "--out", "index"]) == 0
    monkeypatch.chdir("/")  # the tokenizer is found again from anywhere
    assert main(["rag", "index", str(tmp_path / "a.txt"), "--out", str(tmp_path / "index"), "--add"]) == 0
    vocabulary = next((tmp_path / "model").rglob("tokenizer.json"))
    data = json.loads(vocabulary.read_text())
    data["added_tokens"].append({**data["added_tokens"][-1], "id": 10**6, "content": "<new>"})
    vocabulary.write_text(json.dumps(data))
    tokens._load.cache_clear()  # as in another process
    capsys.readouterr()
    assert main(["rag", "index", str(tmp_path / "a.txt"), "--out", str(tmp_path / "index"), "--add"]) == 1
    assert "another tokenizer" in capsys.readouterr().err


def test_eval_prints_a_row_a_method(tmp_path, capsys):
    file = squad_file(tmp_path)
    out = tmp_path / "index"
    assert main(["rag", "index", str(file), "--out", str(out), "--encoder", "bm25", "--passages", "document"]) == 0
    capsys.readouterr()
    assert main(["rag", "eval", str(out), str(file)]) == 0
    assert "bm25" in (shown := capsys.readouterr().out) and "100.0%" in shown
    assert main(["rag", "eval", str(out), str(file), "--json", "--k", "1"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["top_1"] == 1


def test_questions_about_another_index_are_said_to_be(index, tmp_path, capsys):
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([{"question": "Who ate the moon?", "answers": ["a quagga"]}]))
    assert main(["rag", "eval", str(index), str(questions), "--out", str(tmp_path / "measured")]) == 0
    assert "belong together?" in capsys.readouterr().err
    figures = json.loads((tmp_path / "measured" / "manifest.json").read_text())["figures"]
    assert figures["retrieval_bm25_top_5"] == 0 and all(name.replace("_", "").isalnum() for name in figures)


def test_an_answer_without_support_names_the_passages(index, tiny_checkpoint, capsys):
    assert main(["rag", "ask", str(index), str(tiny_checkpoint), "What is basil?", "--max-tokens", "8"]) == 0
    said = capsys.readouterr()
    assert said.out == "No passage supports this.\n" and "Basil  (notes/page.html)" in said.err


def asked(capsys, index, model, *words) -> dict:
    assert main(["rag", "ask", str(index), str(model), "What is basil?", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_ask_prints_an_answer_with_citations(index, tiny_checkpoint, capsys):
    row = asked(capsys, index, tiny_checkpoint, "--k", "1", "--max-tokens", "2")
    assert {"answer", "citations"} <= set(row)


def test_ask_quotes_a_sentence(index, tiny_checkpoint, capsys):
    row = asked(capsys, index, tiny_checkpoint, "--sentences", "1", "--quote")
    quote = row.get("written", row["answer"])
    assert any(quote in " ".join(each["text"].split()) for each in found(capsys, str(index), "basil"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["search", "INDEX", "x", "--k", "0"], "at least 1"),
        (["ask", "INDEX", "MODEL", "x", "--sentences", "0"], "--sentences: at least 1"),
        (["eval", "INDEX", "QUESTIONS", "--quote"], "--quote does nothing without --model"),
        (["search", "INDEX", ""], "empty query"),
        (["search", "INDEX", "x", "--retriever", "dense"], "no dense vectors"),
        (["search", "missing", "x"], "does not exist"),
        (["index", "--out", "new"], "nothing to index"),
        (["index", "missing.txt", "--out", "new"], "does not exist"),
        (["index", "INDEX/manifest.json", "--out", "INDEX", "--encoder", "bm25"], "finished index"),
        (["index", "--out", "INDEX", "--add"], "name both or neither"),
        (["index", "INDEX", "--out", "new", "--tokenizer", "t"], "needed here: a corpus"),
        (["eval", "INDEX", "missing.json"], "not a file"),
        (["nothing"], "unknown 'rag nothing'"),
        # what would be passed over
        (["index", "x.md", "--out", "INDEX", "--add", "--passages", "sentences"], "--passages does nothing with --add"),
        (["index", "x.md", "--out", "INDEX", "--add", "--length=50"], "--length does nothing with --add"),
        (["index", "x.md", "--out", "INDEX", "--add", "--search", "hnsw"], "--search does nothing with --add"),
        (
            ["index", "INDEX/manifest.json", "--out", "INDEX", "--add", "--encoder", "hybrid"],
            "built with --encoder bm25",
        ),
        (
            ["index", "--out", "INDEX", "--remove", "notes/*", "--text-field", "body"],
            "--text-field does nothing without --add",
        ),
        (
            ["index", "DOCS", "--out", "new", "--encoder", "bm25", "--search", "hnsw"],
            "--search does nothing in an index without vectors",
        ),
        (
            ["index", "DOCS", "--out", "new", "--encoder", "bm25", "--precision", "int8"],
            "--precision does nothing in an index without vectors",
        ),
        (
            ["index", "DOCS", "--out", "new", "--passages", "document", "--overlap", "3"],
            "--overlap does nothing with --passages document",
        ),
        (["index", "DOCS", "--out", "INDEX"], "--add adds to it"),
        (
            ["search", "INDEX", "x", "--encoder", "minilm"],
            "--encoder does nothing with INDEX, which was built with --encoder bm25",
        ),
        (["search", "INDEX", "x", "--fusion", "reciprocal"], "--fusion does nothing in a search by bm25"),
        (["search", "INDEX", "x", "--depth", "5"], "--depth does nothing without --rerank"),
        (["search", "INDEX", "x", "--rerank", "nowhere"], "the cross-encoder nowhere does not exist"),
        (["index", "DOCS", "--out", "new", "--encoder", "nowhere"], "the encoder nowhere does not exist"),
        (["index", "DOCS", "--out", "new", "--passages", "tokens", "--tokenizer", "nowhere"], "the tokenizer nowhere"),
        (["ask", "INDEX", "MODEL", "x", "--k", "0"], "at least 1 passage"),
        (["ask", "INDEX", "MODEL", "x", "--beams", "7"], "--beams does nothing with MODEL"),
        (["eval", "INDEX", "QUESTIONS", "--limit", "-5"], "--limit: 0"),
        (["eval", "INDEX", "QUESTIONS", "--passages", "2"], "--passages does nothing without --model"),
    ],
)
def test_what_is_refused_is_said_in_one_line(index, tmp_path, tiny_checkpoint, capsys, words, said):
    places = {
        "INDEX": index,
        "DOCS": tmp_path / "notes",
        "MODEL": tiny_checkpoint,
        "QUESTIONS": squad_file(tmp_path),
        "new": tmp_path / "new",
    }
    for name, place in places.items():
        words, said = [word.replace(name, str(place)) for word in words], said.replace(name, str(place))
    assert main(["rag", *words]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1] and lines[-1].startswith("luban: ")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("verb", ["index", "search", "ask", "eval"])
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["rag", verb, "--help"])
    assert ended.value.code == 0 and f"luban rag {verb} " in capsys.readouterr().out.partition("Examples")[2]
