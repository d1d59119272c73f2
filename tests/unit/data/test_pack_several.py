"""`luban data pack` of several corpora."""

from __future__ import annotations

from pathlib import Path

import pytest

from luban.cli.main import main
from luban.core.artifact import open_artifact, read_manifest
from luban.corpus.build import build_corpus
from luban.corpus.reader import read_corpus
from luban.data.shards import Shards
from luban.tokenizer.tokenizer import load_tokenizer
from luban.tokenizer.train import train_tokenizer


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> Path:
    """Two corpora that share half of their documents, split by other seeds, and a tokenizer."""
    folder = tmp_path_factory.mktemp("several")
    for name, numbers, seed in (("a", range(0, 120), 1), ("b", range(60, 180), 2)):
        for number in numbers:
            file = folder / f"texts-{name}" / f"{name}{number}.txt"  # so that ids differ
            file.parent.mkdir(exist_ok=True)
            file.write_text(f"The note {number} says that {number * 7919 % 1000} birds came by.")
        build_corpus([str(folder / f"texts-{name}")], folder / name, heldout=0.3, seed=seed, steps=())
    train_tokenizer((d.text for d in read_corpus(folder / "a")), folder / "tok", vocab_size=300)
    return folder


def decoded(shards: Shards, tokenizer) -> list[str]:
    return [tokenizer.decode(shards.document(i).tolist()) for i in range(shards.documents)]


def test_several_corpora_are_packed_in_order_without_what_one_of_them_holds_out(corpora, tmp_path, capsys):
    paths = [corpora / "a", corpora / "b"]
    command = ["data", "pack", *map(str, paths), "--tokenizer", str(corpora / "tok"), "--out", str(tmp_path / "s")]
    assert main(command) == 0
    texts = {split: [[d.text for d in read_corpus(path, split)] for path in paths] for split in ("train", "heldout")}
    heldout = {text for part in texts["heldout"] for text in part}
    kept = [[text for text in part if text not in heldout] for part in texts["train"]]
    leaks = [len(part) - len(left) for part, left in zip(texts["train"], kept, strict=True)]
    assert all(leaks)
    tokenizer = load_tokenizer(tmp_path / "s" / "tokenizer")
    assert decoded(Shards.open(tmp_path / "s"), tokenizer) == [text for part in kept for text in part]
    assert decoded(Shards.open(tmp_path / "s", "heldout"), tokenizer) == [t for part in texts["heldout"] for t in part]
    err = capsys.readouterr().err
    assert all(f"{leaks[i]} training documents of {paths[i]} are held out by one of the corpora" in err for i in (0, 1))
    parents = [p for p in open_artifact(tmp_path / "s").parents if p.kind == "corpus"]
    assert [p.content_hash for p in parents] == [read_manifest(path).content_hash for path in paths]


def test_one_corpus_is_packed_as_it_is_and_none_or_twice_the_same_is_refused(corpora, tmp_path, capsys):
    end = ["--tokenizer", str(corpora / "tok"), "--out", str(tmp_path / "s")]
    assert main(["data", "pack", str(corpora / "a"), *end]) == 0
    assert Shards.open(tmp_path / "s").documents == len(list(read_corpus(corpora / "a")))
    end[-1] = str(tmp_path / "other")
    assert main(["data", "pack", *end]) == 2 and "at least one corpus" in capsys.readouterr().err
    assert main(["data", "pack", str(corpora / "a"), str(corpora / "a"), *end]) == 1
    assert "named twice" in capsys.readouterr().err and not list(tmp_path.glob("other*"))
