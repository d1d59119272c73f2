"""What people give `luban rag index` and its searches that isn't as it should be: said, and done without."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from rag_models import write_facts
from test_index import config, reader, write_encoder, write_texts

from luban.cli.main import main
from luban.core.artifact import read_manifest
from luban.retrieval.building import build_index
from luban.retrieval.index import Index


def indexed(paths, out, capsys):
    """Exit code, the index's passages by their sources, and what was said."""
    code = main(["rag", "index", *map(str, paths), "--encoder", "bm25", "--out", str(out)])
    found = {} if code else {p.source: p.text for p in map(Index(out).passage, range(Index(out).places))}
    return code, found, capsys.readouterr().err


def test_a_query_longer_than_the_encoder_reads_is_cut_and_that_is_said(tmp_path, capsys):
    encoder = write_encoder(tmp_path / "encoder")
    build_index(reader(write_texts(tmp_path, range(5))), tmp_path / "index", config(encoder, retriever="dense"))
    index = Index(tmp_path / "index")
    capsys.readouterr()
    whole = index.search("amber " * 15)  # 90 of 96 bytes
    assert "cut" not in capsys.readouterr().err
    hits = index.search("amber " * 15 + "cedar " * 200)
    assert "a query: cut to the 96 tokens that encoder reads" in capsys.readouterr().err
    assert len(hits) == len(whole) == 5


def test_empty_documents_and_legacy_encodings(tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "empty.txt").write_bytes(b"")
    (folder / "white.md").write_text(" \n\n\t\n")
    prose = "Der Bär läuft über die Straße und sucht süße Äpfel für die Brüder im Gehölz. " * 8
    (folder / "german.txt").write_bytes(prose.encode("cp1252"))
    (folder / "chinese.txt").write_bytes(("学而时习之，不亦说乎？有朋自远方来，不亦乐乎？" * 12).encode("gb18030"))
    (folder / "noise.txt").write_bytes(bytes(random.Random(3).randrange(256) for _ in range(3000)))
    code, found, _ = indexed([folder], tmp_path / "index", capsys)
    assert code == 0
    by_name = {source.rpartition("/")[2]: text for source, text in found.items()}
    assert "Straße" in by_name["german.txt"] and "学而时习之" in by_name["chinese.txt"]
    assert not {"empty.txt", "white.md"} & set(by_name)
    code, _, said = indexed([folder / "empty.txt"], tmp_path / "none", capsys)
    assert code == 1 and "empty.txt is empty" in said and not (tmp_path / "none.incomplete").exists()


def test_a_row_of_100_megabytes_is_left_out_and_said(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    with open(file, "w") as rows:
        rows.write('{"text": "' + "a" * 100_000_000 + '"}\n{"text": "a short one"}\n')
    code, found, said = indexed([file], tmp_path / "index", capsys)
    assert code == 0 and list(found.values()) == ["a short one"]
    assert "not indexed: 1 oversized JSON lines" in said


def test_fewer_passages_than_asked_for(tmp_path, capsys):
    recipe = write_facts(tmp_path, two_sided=False)
    assert len(Index(recipe.index).search("what is tin?", 100)) == 6
    assert main(["rag", "eval", str(recipe.index), str(recipe.data), "--k", "1", "100"]) == 0
    assert "100.0%" in capsys.readouterr().out


@pytest.mark.slow
def test_a_hundred_thousand_passages_killed_at_random_are_the_same(tmp_path):
    file = write_texts(tmp_path, range(37_000), seed=2)
    build_index(reader(file), tmp_path / "whole", config())
    assert read_manifest(tmp_path / "whole").figures["passages"] > 100_000
    code = (
        "import sys; from test_index import config, reader\n"
        "from luban.retrieval.building import build_index\n"
        "build_index(reader(sys.argv[1]), sys.argv[2], config())"
    )
    words = [sys.executable, "-c", code, str(file), str(tmp_path / "killed")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    kills, seconds = 0, 3.0
    while not (tmp_path / "killed").exists():
        process = subprocess.Popen(words, env=environment)
        stop = time.monotonic() + random.uniform(0, seconds)
        while process.poll() is None and time.monotonic() < stop:
            time.sleep(0.02)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        seconds *= 1.3  # so that any machine ends
    assert kills
    assert len({read_manifest(tmp_path / name).content_hash for name in ("whole", "killed")}) == 1
