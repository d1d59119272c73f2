"""The index artifact: built, resumed, changed, searched; anything but its own encoder refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import write_checkpoint

from luban.core.artifact import open_artifact, read_manifest
from luban.core.errors import ArtifactError, ConfigError, DataError, LineageError, UnsupportedError, UsageError
from luban.retrieval import building
from luban.retrieval.building import IndexConfig, build_index
from luban.retrieval.changing import change_index
from luban.retrieval.documents import DocumentReader
from luban.retrieval.index import Index
from luban.retrieval.passages.words import Words

WORDS = [
    "amber",
    "basil",
    "cedar",
    "delta",
    "ember",
    "fable",
    "grove",
    "harbor",
    "island",
    "jungle",
    "kernel",
    "ledger",
]
RULE = Words(length=5)


def write_texts(folder, names, seed=None):
    """JSON lines of random texts, one file."""
    rng = random.Random(seed)
    rows = [{"id": name, "text": " ".join(rng.choices(WORDS, k=rng.randrange(1, 25)))} for name in names]
    folder.mkdir(exist_ok=True)
    file = folder / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def write_encoder(folder, seed=0):
    """A random encoder over bytes."""
    from luban.models.encoder import EncoderBody
    from luban.models.head.hidden import Hidden
    from luban.models.spec import uniform
    from luban.nn.feedforward.gated import SwiGLU
    from luban.nn.init import NormalInit
    from luban.nn.mixer.grouped import Grouped

    spec = uniform(
        vocab_size=272,
        width=16,
        layers=1,
        context=96,
        mixer=Grouped(heads=2),
        feedforward=SwiGLU(width=16),
        body=EncoderBody(),
        head=Hidden(),
        init=NormalInit(std=0.5),
    )
    return write_checkpoint(folder, spec, seed)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "one")


def reader(*files):
    return DocumentReader([str(file) for file in files])


def rows(index, query, k=50, **options):
    return [(hit.passage.source, hit.passage.start, round(hit.score, 9)) for hit in index.search(query, k, **options)]


def config(encoder=None, **fields):
    retriever = fields.pop("retriever", "bm25" if encoder is None else "hybrid")
    return IndexConfig(retriever=retriever, encoder=None if encoder is None else str(encoder), rule=RULE, **fields)


def test_a_build_that_stopped_anywhere_goes_on_and_is_the_same(tmp_path, encoder, monkeypatch):
    file = write_texts(tmp_path, range(30))
    build_index(reader(file), tmp_path / "whole", config(encoder, segment=20))
    written = []
    finish = building._finish

    def stops(*arguments):
        if len(written) in (1, 2):
            written.append(None)
            raise RuntimeError("the power is gone")
        finish(*arguments)
        written.append(None)

    monkeypatch.setattr(building, "_finish", stops)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            build_index(reader(file), tmp_path / "parts", config(encoder, segment=20))
        assert not (tmp_path / "parts").exists()
    build_index(reader(file), tmp_path / "parts", config(encoder, segment=20))
    whole, parts = (read_manifest(tmp_path / name) for name in ("whole", "parts"))
    assert whole.content_hash == parts.content_hash and len(parts.files) > 20
    open_artifact(tmp_path / "parts", "index")


def test_a_killed_process_leaves_a_build_that_goes_on(tmp_path):
    file = write_texts(tmp_path, range(40), seed=1)
    code = (
        "import os, sys; from luban.retrieval import building; from luban.retrieval.documents import DocumentReader\n"
        "from luban.retrieval.passages.words import Words\n"
        "finish, done = building._finish, []\n"
        "def kill(*a):\n"
        "    part = a[1] / '000002.part'\n"
        "    finish(*a) if len(done) < 2 else (part.mkdir(), a[0].write(part), os._exit(9))\n"
        "    done.append(1)\n"
        "building._finish = kill\n"
        "building.build_index(DocumentReader([sys.argv[1]]), sys.argv[2], building.IndexConfig(rule=Words(length=5), segment=20))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(file), str(tmp_path / "killed")])
    assert ended.returncode == 9 and (tmp_path / "killed.incomplete").is_dir()
    for name in ("killed", "whole"):
        build_index(reader(file), tmp_path / name, config(segment=20))
    hashes = {read_manifest(tmp_path / name).content_hash for name in ("killed", "whole")}
    assert len(hashes) == 1


def test_documents_that_changed_since_an_interruption_are_refused(tmp_path, monkeypatch):
    file = write_texts(tmp_path, range(30))
    finish = building._finish
    monkeypatch.setattr(building, "_finish", lambda *a: (finish(*a), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        build_index(reader(file), tmp_path / "index", config(segment=20))
    monkeypatch.undo()
    write_texts(tmp_path, range(30))
    with pytest.raises(ArtifactError, match="changed since"):
        build_index(reader(file), tmp_path / "index", config(segment=20))


@pytest.mark.parametrize("retriever", ["bm25", "dense", "hybrid"])
def test_adding_and_removing_equals_building_anew(tmp_path, encoder, retriever):
    first = write_texts(tmp_path / "a", range(20))
    more = write_texts(tmp_path / "b", range(15, 30))  # 15 to 19 are replaced
    options = config(None if retriever == "bm25" else encoder, retriever=retriever, segment=30)
    build_index(reader(first), tmp_path / "index", options)
    change_index(tmp_path / "index", reader(more))
    change_index(tmp_path / "index", remove=["texts.jsonl#3", "texts.jsonl#2?"])
    left = [row for row in map(json.loads, first.read_text().splitlines()) if row["id"] < 15 and row["id"] != 3]
    left += [row for row in map(json.loads, more.read_text().splitlines()) if row["id"] < 20]
    (tmp_path / "c").mkdir()
    fresh = tmp_path / "c" / "texts.jsonl"
    fresh.write_text("".join(json.dumps(row) + "\n" for row in left))
    build_index(reader(fresh), tmp_path / "fresh", options)
    changed, anew = Index(tmp_path / "index"), Index(tmp_path / "fresh")
    assert len(changed) == len(anew) and changed.manifest.figures == anew.manifest.figures
    for query in ("amber basil", "cedar", "kernel ledger island amber"):
        one, two = ({row[:2]: row[2] for row in rows(index, query, 500)} for index in (changed, anew))
        assert one.keys() == two.keys() and all(one[key] == pytest.approx(two[key], abs=1e-5) for key in one)
    assert changed.manifest.content_hash != anew.manifest.content_hash
    open_artifact(tmp_path / "index", "index")


def test_a_killed_change_leaves_the_index_as_it_was(tmp_path, monkeypatch):
    first, more = write_texts(tmp_path / "a", range(9)), write_texts(tmp_path / "b", range(9, 18))
    build_index(reader(first), tmp_path / "index", config())
    before = rows(Index(tmp_path / "index"), "amber")
    monkeypatch.setattr("luban.retrieval.changing.write_json", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        change_index(tmp_path / "index", reader(more), ["texts.jsonl#1"])
    assert rows(Index(tmp_path / "index"), "amber") == before
    monkeypatch.undo()
    assert change_index(tmp_path / "index", reader(more))["documents"] == 18
    assert len(list((tmp_path / "index" / "segments").iterdir())) == 2


def test_two_writers_are_refused(tmp_path):
    import fcntl
    import os

    file = write_texts(tmp_path, range(5))
    build_index(reader(file), tmp_path / "index", config())
    other = os.open(tmp_path / "index", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(ArtifactError, match="another process"):
            change_index(tmp_path / "index", remove=["texts.jsonl#1"])
    finally:
        os.close(other)
    with pytest.raises(ArtifactError, match="finished index"):
        build_index(reader(file), tmp_path / "index", config())


def test_only_the_encoder_that_built_an_index_may_query_it(tmp_path, encoder):
    file = write_texts(tmp_path, range(5))
    mine = write_encoder(tmp_path / "mine", seed=3)
    build_index(reader(file), tmp_path / "index", config(mine))
    with pytest.raises(LineageError, match="weights_hash"):
        Index(tmp_path / "index", encoder=encoder).search("amber")
    pooling = [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "pool"}]
    (mine / "modules.json").write_text(json.dumps(pooling))
    (mine / "pool").mkdir()
    (mine / "pool" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    with pytest.raises(LineageError, match="pooling"):
        Index(tmp_path / "index").search("amber")
    mine.rename(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="needs the encoder that built it"):
        Index(tmp_path / "index").search("amber")
    assert Index(tmp_path / "index").search("amber", retriever="bm25")
    (tmp_path / "moved" / "modules.json").unlink()
    assert Index(tmp_path / "index", encoder=tmp_path / "moved").search("amber")
    more = write_texts(tmp_path / "more", range(5, 8))
    with pytest.raises(LineageError, match="weights_hash"):
        change_index(tmp_path / "index", reader(more), encoder=encoder)
    change_index(tmp_path / "index", reader(more), encoder=tmp_path / "moved")
    assert Index(tmp_path / "index").search("amber")  # its new place is remembered


def test_parents_are_encoder_tokenizer_and_corpus(tmp_path, encoder):
    from luban.corpus.build import build_corpus

    file = write_texts(tmp_path, range(40))
    build_corpus([str(file)], tmp_path / "corpus", heldout=0.3)
    figures = build_index(reader(tmp_path / "corpus"), tmp_path / "index", config(encoder))
    manifest = read_manifest(tmp_path / "index")
    assert [parent.role for parent in manifest.parents] == ["corpus", "encoder", "tokenizer"]
    assert figures["documents"] > 30  # held-out ones too
    assert manifest.config["passages"] == {"type": "words", "length": 5, "overlap": 0}


def test_dense_and_int8_are_exact_on_their_vectors(tmp_path, encoder):
    file = write_texts(tmp_path, range(20))
    build_index(reader(file), tmp_path / "f", config(encoder, retriever="dense", segment=15))
    build_index(reader(file), tmp_path / "i", config(encoder, retriever="dense", precision="int8", segment=15))
    exact, small = Index(tmp_path / "f"), Index(tmp_path / "i")
    vectors = exact.vectors.floats(np.arange(len(exact)))
    query = exact.encoder.queries(["amber cedar"])[0]
    expected = np.sort(vectors @ query)[::-1]
    np.testing.assert_allclose([hit.score for hit in exact.search("amber cedar", 1000)], expected, atol=1e-6)
    np.testing.assert_allclose([hit.score for hit in small.search("amber cedar", 1000)], expected, atol=0.02)
    with pytest.raises(UnsupportedError, match="no postings"):
        exact.search("amber", retriever="bm25")


def test_a_graph_is_extended_and_finds_what_exact_search_finds(tmp_path, encoder):
    pytest.importorskip("usearch")
    first, more = write_texts(tmp_path / "a", range(40), seed=5), write_texts(tmp_path / "b", range(40, 60), seed=6)
    figures = build_index(
        reader(first), tmp_path / "index", config(encoder, retriever="dense", search="hnsw", segment=90)
    )
    assert figures["hnsw"]["recall_at_10"] > 0.95
    change_index(tmp_path / "index", reader(more), ["texts.jsonl#7"])
    index = Index(tmp_path / "index")
    assert len(index.graph.index) == index.places
    found, exact = (index.search("amber basil", 10, exact=exact) for exact in (False, True))
    assert len({hit.place for hit in found} & {hit.place for hit in exact}) >= 9
    assert not any(hit.passage.source == "texts.jsonl#7" for hit in index.search("amber", 500))


def test_as_many_candidates_are_held_as_the_recall_needs(tmp_path, encoder, monkeypatch):
    pytest.importorskip("usearch")
    measured = {96: 0.91, 192: 0.949, 384: 0.95, 768: 1.0}
    monkeypatch.setattr("luban.retrieval.linking.recall", lambda graph, segments, expansion: measured[expansion])
    file = write_texts(tmp_path, range(20))
    figures = build_index(reader(file), tmp_path / "index", config(encoder, retriever="dense", search="hnsw"))["hnsw"]
    assert (figures["expansion"], figures["recall_at_10"]) == (384, 0.95)
    index, held = Index(tmp_path / "index"), []
    search = index.graph.search
    index.graph.search = lambda *given: (held.append(given[-1]), search(*given))[1]
    assert index.search("amber basil", 3) and held == [384]
    monkeypatch.setattr("luban.retrieval.linking.recall", lambda graph, segments, expansion: 0.5)
    build_index(reader(file), tmp_path / "hard", config(encoder, retriever="dense", search="hnsw"))
    assert read_manifest(tmp_path / "hard").figures["hnsw"]["expansion"] == 768


def test_bad_input_is_refused_in_words(tmp_path):
    file = write_texts(tmp_path, range(5))
    build_index(reader(file), tmp_path / "index", config())
    index = Index(tmp_path / "index")
    assert len(index.search("amber", 10_000)) <= len(index)
    with pytest.raises(UsageError, match="at least 1"):
        index.search("amber", 0)
    with pytest.raises(DataError, match="empty query"):
        index.search("  ")
    with pytest.raises(UnsupportedError, match="--encoder bm25"):
        index.search("amber", retriever="dense")
    with pytest.raises(DataError, match="no document of the index"):
        change_index(tmp_path / "index", remove=["nothing"])
    with pytest.raises(DataError, match="nothing would be left"):
        change_index(tmp_path / "index", remove=["*"])
    with pytest.raises(DataError, match="does not exist"):
        reader(tmp_path / "missing.txt")
    with pytest.raises(UsageError, match="nothing to index"):
        DocumentReader([])
    with pytest.raises(ConfigError, match="encoder"):
        IndexConfig(retriever="hybrid")
    (tmp_path / "dots.txt").write_text("...\n")
    with pytest.raises(DataError, match="no words"):
        build_index(reader(tmp_path / "dots.txt"), tmp_path / "none", config())
    assert not (tmp_path / "none.incomplete").exists()
