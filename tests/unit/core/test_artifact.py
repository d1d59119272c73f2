"""Artifacts: nothing that passes for finished is half-written, and nothing edited passes for whole."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from luban.core.artifact import MANIFEST, ArtifactWriter, as_parent, open_artifact, read_manifest
from luban.core.errors import ArtifactError, DataError, LineageError
from luban.core.lineage import ancestor, ancestors, require_same
from luban.core.whole_directory import incomplete_path


def make(out, content=b"abc", kind="thing", **identity):
    with ArtifactWriter(out, kind=kind, **identity) as art:
        (art.path / "sub").mkdir()
        (art.path / "sub" / "data.bin").write_bytes(content)
    return out


def test_round_trip(tmp_path):
    make(tmp_path / "a", config={"n": 3, "x": 0.1}, seed=7)
    manifest = open_artifact(tmp_path / "a", "thing")
    assert manifest.config == {"n": 3, "x": 0.1} and manifest.seed == 7 and manifest.status == "finished"
    assert list(manifest.files) == ["sub/data.bin"]
    assert not incomplete_path(tmp_path / "a").exists()


def test_the_hash_covers_identity_and_content_and_nothing_else(tmp_path, monkeypatch):
    base = read_manifest(make(tmp_path / "a", config={"n": 1}, seed=0)).content_hash
    created = read_manifest(tmp_path / "a").created
    long_ago = time.gmtime(1e9)
    monkeypatch.setattr(time, "gmtime", lambda *_: long_ago)
    with ArtifactWriter(tmp_path / "b", kind="thing", config={"n": 1}, seed=0, volatile=("*.log",)) as art:
        (art.path / "sub").mkdir()
        (art.path / "sub" / "data.bin").write_bytes(b"abc")
        (art.path / "times.log").write_text(str(time.time()))
        art.note(seconds=random.random())
    assert read_manifest(tmp_path / "b").content_hash == base
    assert read_manifest(tmp_path / "b").created == "2001-09-09T01:46:40Z" != created
    for name, change in {
        "c": {"config": {"n": 2}, "seed": 0},
        "d": {"config": {"n": 1}, "seed": 1},
        "e": {"config": {"n": 1}, "seed": 0, "content": b"abd"},
        "f": {"config": {"n": 1}, "seed": 0, "kind": "other"},
        "g": {"config": {"n": 1}, "seed": 0, "parents": (as_parent("p", tmp_path / "a"),)},
    }.items():
        assert read_manifest(make(tmp_path / name, **change)).content_hash != base, name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"colour": 1}, "is damaged: unknown field 'colour'"),
        ({"kind": ...}, "is damaged: it has no field 'kind'"),
        ({"parents": ...}, "is damaged: it has no field 'parents'"),
        ({"parents": 3}, "is damaged: a field holds a value of another type"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said_without_pythons_words(tmp_path, change, words):
    path = make(tmp_path / "a") / MANIFEST
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    with pytest.raises(ArtifactError, match=words):
        read_manifest(tmp_path / "a")


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "garbage"])
def test_damage_is_found_and_named(tmp_path, damage):
    path = make(tmp_path / "a", content=os.urandom(1000))
    file = path / "sub" / "data.bin"
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[random.randrange(1000)] ^= 1 << random.randrange(8)
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[: random.randrange(1000)])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        manifest = json.loads((path / MANIFEST).read_text())
        manifest["config"] = {"n": 9}
        (path / MANIFEST).write_text(json.dumps(manifest))
    else:
        (path / MANIFEST).write_text('{"kind": ')
    with pytest.raises(ArtifactError, match=r"damaged|edited"):
        open_artifact(path)


def test_an_exception_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), ArtifactWriter(tmp_path / "a", kind="thing") as art:
        (art.path / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_occupied_directories_are_refused(tmp_path):
    make(tmp_path / "done")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.doc").write_text("do not touch")
    (tmp_path / "file").write_text("")
    for name, words in (("done", "already holds a finished thing"), ("foreign", "not empty"), ("file", "is a file")):
        with pytest.raises(ArtifactError, match=words):
            make(tmp_path / name)
    assert (tmp_path / "foreign" / "thesis.doc").read_text() == "do not touch"


def test_an_unfinished_run_resumes_with_the_same_identity_only(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), ArtifactWriter(out, kind="run", config={"lr": 1.0}, resumable=True) as art:
        (art.path / "half").write_text("x")
        art.note(steps=5)
        raise KeyboardInterrupt
    with pytest.raises(ArtifactError, match=r"unfinished: run the command"):
        open_artifact(out)
    with (
        pytest.raises(ArtifactError, match=r"config\.lr was 1\.0, now 2\.0"),
        ArtifactWriter(out, kind="run", config={"lr": 2.0}, resumable=True),
    ):
        pass
    with ArtifactWriter(out, kind="run", config={"lr": 1.0}, resumable=True) as art:
        assert art.resumed and art.figures == {"steps": 5} and (art.path / "half").exists()
    assert open_artifact(out).figures == {"steps": 5}


def test_a_refusal_leaves_nothing_even_where_work_could_resume(tmp_path):
    with pytest.raises(DataError), ArtifactWriter(tmp_path / "a", kind="run", resumable=True) as art:
        (art.path / "half").write_text("x")
        raise DataError("the source is empty")
    assert list(tmp_path.iterdir()) == []


def _write_slowly(out, started):
    with ArtifactWriter(out, kind="thing", resumable=True) as art:
        (art.path / "data").write_bytes(b"x")
        started.set()
        signal.pause()


def test_kill_never_leaves_a_finished_directory_and_the_lock_dies_with_its_owner(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    writer = context.Process(target=_write_slowly, args=(tmp_path / "a", started))
    writer.start()
    while not started.wait(0.1):
        assert writer.is_alive()
    with pytest.raises(ArtifactError, match="another process"):
        make(tmp_path / "a")
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert not (tmp_path / "a").exists()
    make(tmp_path / "a")
    open_artifact(tmp_path / "a")


def test_the_family_tree_needs_no_other_directory(tmp_path):
    corpus = make(tmp_path / "corpus", kind="corpus", content=b"text")
    tokenizer = make(tmp_path / "tok", kind="tokenizer", parents=(as_parent("corpus", corpus),))
    shards = make(
        tmp_path / "shards", kind="shards", parents=(as_parent("corpus", corpus), as_parent("tokenizer", tokenizer))
    )
    manifest = read_manifest(shards)
    assert [p.kind for p in ancestors(manifest)] == ["corpus", "tokenizer", "corpus"]
    found = ancestor(manifest, "tokenizer")
    assert found.content_hash == read_manifest(tokenizer).content_hash
    other = read_manifest(make(tmp_path / "tok2", kind="tokenizer", content=b"z")).content_hash
    require_same("tokenizer", "a", found.content_hash, "b", found.content_hash, "")
    with pytest.raises(LineageError, match=r"shards s and model m were made with different tokenizers .*: repack"):
        require_same("tokenizer", "shards s", found.content_hash, "model m", other, "repack")


def test_a_full_disk_leaves_nothing_finished(tmp_path):
    import resource

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            make(tmp_path / "a", content=os.urandom(100_000))
        except OSError:
            os._exit(17)
        os._exit(0)

    child = multiprocessing.get_context("fork").Process(target=fill)
    child.start()
    child.join()
    assert child.exitcode == 17 and list(tmp_path.iterdir()) == []


def test_the_incomplete_directory_of_any_path_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for path, wanted in (
        ("a", "a.incomplete"),
        (tmp_path / "a.b", tmp_path / "a.b.incomplete"),
        (".", f"{tmp_path}.incomplete"),
        ("link", tmp_path / "real.incomplete"),
        ("/", "/.incomplete"),
    ):
        assert incomplete_path(path) == Path(wanted)
