"""Evaluation sets of every format and length are found, and what is too short to be looked for is said."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pytest

from luban.core.errors import DataError
from luban.corpus.build import build_corpus
from luban.corpus.document import Document
from luban.corpus.evaluation import evaluation_texts
from luban.corpus.reader import read_corpus
from luban.corpus.split import is_heldout
from luban.corpus.steps import make_step
from luban.corpus.steps.contamination import FEWEST, GRAM, SHORTEST, WINDOW, Contamination
from luban.corpus.tally import Tally
from luban.corpus.words import words

RNG = random.Random(21)
WORDS = ["".join(RNG.choices("abcdefghijklmnopqrstuvwxyz", k=RNG.randint(3, 9))) for _ in range(4000)]


def text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def items(count: int = 40) -> list[str]:
    """Texts of 8 to 40 words, some with commas and line ends."""
    rng = random.Random(count)
    return [text(rng, rng.randint(FEWEST, 40)).replace(" a", ", a").replace(" b", '\n"b') for _ in range(count)]


def write(folder, kind: str, texts: list[str]):
    """The texts as a file of one format."""
    rows = [{"question": t, "answers": {"text": ["x", t]}} for t in texts]
    lines = "\n".join(json.dumps(row) for row in rows)
    data = {
        "jsonl": lines.encode(),
        "json": json.dumps({"data": rows}).encode(),
        "bom.jsonl": b"\xef\xbb\xbf" + lines.encode() + b"\r\n\n \n",
        "JSONL": lines.encode() + b"\n\n",
        "lines.json": lines.encode(),
        "jsonl.gz": gzip.compress(lines.encode()),
        "jsonl.bz2": bz2.compress(lines.encode()),
        "json.xz": lzma.compress(json.dumps(rows).encode()),
        "txt": "\n".join(" ".join(t.split()) for t in texts).encode(),
    }
    path = folder / f"set.{kind}"
    if kind in ("csv", "tsv"):
        out = io.StringIO(newline="")
        csv.writer(out, delimiter="," if kind == "csv" else "\t").writerows(
            [["id", "text"], *(["1", t] for t in texts)]
        )
        path.write_text(out.getvalue(), newline="")
    elif kind in ("parquet", "data"):  # a Parquet file is known by its first bytes, whatever it is called
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        path.write_bytes(data[kind])
    return path


FORMATS = [
    "jsonl",
    "json",
    "bom.jsonl",
    "JSONL",
    "lines.json",
    "jsonl.gz",
    "jsonl.bz2",
    "json.xz",
    "txt",
    "csv",
    "tsv",
    "parquet",
    "data",
]


@pytest.mark.parametrize("kind", FORMATS)
def test_every_leak_is_found_whatever_the_format_and_length(kind, tmp_path):
    texts = items()
    step = Contamination(str(write(tmp_path, kind, texts)))
    rng = random.Random(3)
    documents = [
        Document(id=str(i), text=f"{text(rng, 100)} {t} {text(rng, 100)}", source="s") for i, t in enumerate(texts)
    ]
    clean = [Document(id=f"c{i}", text=text(rng, 300), source="s") for i in range(100)]
    left = {document.id: document.text for document in step([*documents, *clean], Tally())}
    assert [left[document.id] for document in clean] == [document.text for document in clean]
    assert not {document.id for document in documents} & set(left)
    for number, leak in enumerate(texts):
        before, _, after = documents[number].text.partition(leak)
        assert (left[f"{number}~0"], left[f"{number}~1"]) == (before[:-WINDOW], after[WINDOW:])


def test_short_texts_are_looked_for_whole_and_shorter_ones_counted(tmp_path, capsys):
    rng = random.Random(4)
    texts = [text(rng, n) for n in range(1, 20)]
    path = write(tmp_path, "json", texts)
    step = Contamination(str(path))
    # "answers" holds every text again, and one word beside it
    assert (step.identity["texts"], step.identity["too_short"]) == (3 * 19, 19 + 2 * (FEWEST - 1))
    assert f"{19 + 2 * (FEWEST - 1)} of 57 texts" in capsys.readouterr().err
    for count, leak in enumerate(texts, 1):
        document = Document(id="d", text=f"{text(rng, 90)} {leak.title()}! {text(rng, 90)}", source="s")
        found = [d.text for d in step([document], Tally())]
        assert (found == [document.text]) is (count < FEWEST)
        if FEWEST <= count < GRAM:  # one word less is another text
            part = Document(id="d", text=f"{text(rng, 90)} {leak.partition(' ')[2]}. {text(rng, 90)}", source="s")
            assert [d.text for d in step([part], Tally())] == [part.text]


def test_places_are_those_of_a_plain_search(tmp_path):
    """Texts of every length, overlapping and side by side, against a loop over all words."""
    rng = random.Random()
    small = ["one", "two", "three", "four"]
    for number in range(30):
        texts = [" ".join(rng.choices(small, k=rng.randint(FEWEST, 16))) for _ in range(6)]
        step = Contamination(str(write(tmp_path, "jsonl", texts)))
        page = " ".join(rng.choices([*small, *texts, *WORDS[:3]], k=rng.randint(1, 60)))
        found = page.split()
        sizes = {tuple(t.split()[i : i + GRAM]) for t in texts for i in range(max(len(t.split()) - GRAM + 1, 1))}
        marked = [
            (i, i + len(gram)) for gram in sizes for i in range(len(found)) if tuple(found[i : i + len(gram)]) == gram
        ]
        runs = words(page)
        leaks = step.fingerprint(Document(id="d", text=page, source="s"))
        expected = sorted((int(runs.starts[a]), int(runs.ends[b - 1])) for a, b in marked)
        assert step._places(runs, leaks) == expected, number


def test_a_leak_in_a_tool_call_drops_its_conversation(tmp_path):
    leak = items()[0]
    step = Contamination(str(write(tmp_path, "jsonl", [leak])))
    call = {"function": {"name": "search", "arguments": json.dumps({"query": " ".join(leak.split())})}}
    messages = [{"role": "user", "content": "Find it"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    tally = Tally()
    assert list(step([Document(id="d", text="Find it\n", source="s", messages=messages)], tally)) == []
    assert tally.dropped["contamination: conversation"]["documents"] == 1


@pytest.mark.parametrize(
    "name, data, words_",
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2"),
        ("a.txt", "é".encode("latin-1"), "not UTF-8"),
        ("a.bin", b"\x00\x01\x02", "neither Parquet, JSON nor UTF-8"),
        ("a.gz", b"\x1f\x8b\x08damaged", "cannot be unpacked"),
        ("a.parquet", b"PAR1damaged", "damaged"),
    ],
)
def test_what_cannot_be_read_is_refused(name, data, words_, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words_):
        list(evaluation_texts(tmp_path / name))
    with pytest.raises(DataError, match="is a folder"):
        list(evaluation_texts(tmp_path))


def test_only_too_short_texts_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("yes\nno\n")
    with pytest.raises(DataError, match=f"no text in .* has {FEWEST} words"):
        make_step(f"contamination={tmp_path / 'a.txt'}")


def test_the_pieces_of_a_document_stay_in_one_split(tmp_path):
    """Documents are cut by contamination, and cut again; every piece falls where the document would."""
    for name in ("a", "b/c.txt", "d~x"):
        for seed in range(50):
            whole = is_heldout(name, 0.5, seed)
            assert {is_heldout(f"{name}{piece}", 0.5, seed) for piece in ("~0", "~1", "~12", "~1~3")} == {whole}
    rng, texts = random.Random(5), items(60)
    path = write(tmp_path, "jsonl", texts)
    rows = [{"text": f"{text(rng, 90)} {leak} {text(rng, 90)}"} for leak in texts]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = build_corpus([str(tmp_path / "in.jsonl")], tmp_path / "c", heldout=0.3, steps=[f"contamination={path}"])
    train, held = ([d.id for d in read_corpus(tmp_path / "c", split)] for split in ("train", "heldout"))
    assert len(train) + len(held) == 120 and {i.split("~")[0] for i in train}.isdisjoint(i.split("~")[0] for i in held)
    assert figures["counts"]["contaminated_documents_cut"] == 60 and SHORTEST < 90 * 4
    assert "60 of 180 texts of the evaluation sets are too short" in (tmp_path / "c" / "README.md").read_text()
