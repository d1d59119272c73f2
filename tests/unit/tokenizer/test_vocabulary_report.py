"""A report's figures against plain counting."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from luban.core.errors import DataError
from luban.tokenizer import report as report_module
from luban.tokenizer.report import Sample, file_texts, measure
from luban.tokenizer.report_tables import _shown, show
from luban.tokenizer.train import train_tokenizer

SAMPLES = [
    Sample("the tokens of the words\n", "a", "en", "prose"),
    Sample("def f(x): return x", "b", "code", "code"),
    Sample("你好世界 tokens", "c", "zh", "prose"),
]


def test_figures_are_those_of_plain_counting(bpe, texts, tmp_path, monkeypatch):
    other = train_tokenizer(texts, tmp_path / "o", algorithm="char", vocab_size=300)
    found = measure(bpe, iter(SAMPLES), {"chars": other})
    ids = [bpe.encode(sample.text) for sample in SAMPLES]
    assert (found.total.bytes, found.total.tokens) == (24 + 18 + 19, sum(map(len, ids)))
    assert (found.names["a"].words, found.names["c"].words) == (5, 5)  # a Chinese sign is a word
    assert found.languages["zh"].fertility == len(ids[2]) / 5 and found.domains["prose"].tokens == len(ids[0]) + len(
        ids[2]
    )
    assert found.total.used == len({i for row in ids for i in row}) / bpe.vocab_size
    assert found.total.against("chars") == sum(len(other.encode(s.text)) for s in SAMPLES) / found.total.tokens
    used = {i for row in ids for i in row} | set(bpe.special.values())
    assert found.unused() == [i for i in range(bpe.vocab_size) if i not in used and len(bpe.decode([i])) > 1]
    assert len(found.longest(1)[0]) == max(len(bpe.decode([i])) for i in range(bpe.vocab_size))
    monkeypatch.setattr(report_module, "ROUND", 1)
    assert measure(bpe, iter(SAMPLES)).total.tokens == found.total.tokens


def test_files_are_cut_at_line_ends_and_lose_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "PIECE", 10)
    path = tmp_path / "t.txt"
    path.write_bytes(b"one\r\ntwo three four five\nsix\n\nseven")
    pieces = list(file_texts(path))
    assert "".join(pieces).encode() == path.read_bytes() and len(pieces) > 1
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    path.write_bytes(b"")
    for missing in (path, tmp_path / "none"):
        with pytest.raises(DataError, match=missing.name):
            list(file_texts(missing))


def test_the_tables_hold_every_group_and_neighbour(bpe):
    assert (_shown(" " * 64), _shown("ab"), _shown("x" * 30 + "yz!")) == ("' '×64", "'ab'", repr("x" * 30 + "yz…"))
    out = io.StringIO()
    show(measure(bpe, iter(SAMPLES), {"self": bpe}), "tok", ["self"], Console(file=out, width=160))
    shown = out.getvalue()
    assert all(word in shown for word in ("bytes/token", "tokens/word", "self", "en", "zh", "code", "prose", "×1.00"))
    with pytest.raises(DataError, match="no text"):
        measure(bpe, [])
