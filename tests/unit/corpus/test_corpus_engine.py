"""The same bytes from one worker and from four, interrupted or not, on this machine or on Ray."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from luban.core.artifact import open_artifact
from luban.core.errors import ArtifactError, ConfigError, DataError
from luban.core.log import Bar
from luban.corpus.build import build_corpus
from luban.corpus.engine import WorkerLost
from luban.corpus.engine.phase import phases_of
from luban.corpus.engine.ray import RayExecutor
from luban.corpus.reader import read_corpus
from luban.corpus.sources import find_sources
from luban.corpus.steps import make_step
from luban.corpus.tally import Tally

ROOT = Path(__file__).resolve().parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
STEPS = ("personal", "exact", "gopher", "minhash", "c4")
SMALL_PARTS = "import luban.corpus.sources.jsonl as j; j.PART_BYTES = 20_000"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Prose with repeats, near-repeats, addresses and rubbish, in a few hundred documents."""
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("engine") / "in.jsonl"
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 8))) for _ in range(3000)]
    texts = []
    for _ in range(300):
        sentences = [" ".join([*rng.choices(words, k=9), rng.choice(["the", "of", "and"])]) + "." for _ in range(9)]
        texts.append("\n".join(["With the mail of a@b.org here.", *sentences]))
    texts += [text.replace(" the", " that", 1) for text in texts[:60]] + texts[100:160] + ["short"] * 20
    rng.shuffle(texts)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("luban.corpus.sources.jsonl.PART_BYTES", 20_000)


@pytest.fixture(scope="module")
def expected(source):
    """The documents that the steps leave when each simply runs over all that the one before left."""
    tally = Tally()
    documents = [d for s in find_sources([str(source)]) for d in s.documents(tally, 0, 0.0)]
    rows = [("read", len(documents))]
    for name in STEPS:
        documents = list(make_step(name)(documents, tally))
        rows.append((name, len(documents)))
    return documents, rows, tally.figures()


def test_parts_give_what_one_pass_over_everything_gives(source, expected, tmp_path):
    documents, rows, counted = expected
    figures = build_corpus([str(source)], tmp_path / "c", heldout=0.0, steps=STEPS)
    assert [(d.id, d.text) for d in read_corpus(tmp_path / "c")] == [(d.id, d.text) for d in documents]
    assert [(row["step"], row["documents"]) for row in figures["waterfall"]] == rows
    assert {name: figures[name] for name in counted} == counted
    assert rows[1][1] > rows[2][1] > rows[3][1] > rows[4][1] > 100  # every filter had something to do


def test_steps_are_cut_behind_those_that_compare_documents():
    phases = phases_of(list(STEPS))
    assert [(p.apply, p.steps, p.fingerprint) for p in phases] == [
        (None, ("personal",), "exact"),
        ("exact", ("gopher",), "minhash"),
        ("minhash", ("c4",), None),
    ]
    assert [p.number for p in phases_of([])] == [0]


def content(path):
    return open_artifact(path, "corpus").content_hash


def test_four_workers_write_the_same_bytes(source, tmp_path):
    one = build_corpus([str(source)], tmp_path / "one", steps=STEPS)
    four = build_corpus([str(source)], tmp_path / "four", steps=STEPS, workers=4)
    assert one == four
    assert content(tmp_path / "one") == content(tmp_path / "four")
    assert not (tmp_path / "four" / "work").exists()


def test_a_build_that_was_killed_goes_on_and_writes_the_same_bytes(source, tmp_path):
    build_corpus([str(source)], tmp_path / "whole", steps=STEPS)
    code = f"""
{SMALL_PARTS}
import sys
from pathlib import Path
from calls import signal_after
import luban.corpus.engine.local as local
run, done = local.run_task, Path({str(tmp_path / "c.incomplete" / "work")!r})
def run_and_count(task, report):
    run(task, report)
    if len(list(done.glob("phase-" + sys.argv[1] + "/*.json"))) == 3:
        signal_after(int(sys.argv[2]), {signal.SIGKILL:d})  # while the next task runs
local.run_task = run_and_count
from luban.corpus.build import build_corpus
build_corpus([{str(source)!r}], {str(tmp_path / "c")!r}, steps={STEPS!r})
"""
    work = tmp_path / "c.incomplete" / "work"
    for phase, calls in ((0, 57), (1, 140)):
        words = [sys.executable, "-c", code, str(phase), str(calls)]
        assert subprocess.run(words, env=ENVIRONMENT, check=False).returncode == -signal.SIGKILL
    done = {path: path.stat().st_mtime_ns for path in work.glob("phase-0/*.json")}
    assert len(done) > 5 and not (tmp_path / "c").exists()
    seen = []

    def watch(task, report):
        seen.append(task.phase.number)
        run(task, report)

    import luban.corpus.engine.local as local

    run, local.run_task = local.run_task, watch
    try:
        build_corpus([str(source)], tmp_path / "c", steps=STEPS)
    finally:
        local.run_task = run
    assert 0 not in seen and 0 < seen.count(1) < len(done)
    assert content(tmp_path / "c") == content(tmp_path / "whole")


def test_a_changed_input_is_not_mixed_with_what_was_done(source, tmp_path):
    copy = tmp_path / "in.jsonl"
    copy.write_text(source.read_text())
    unfinished = tmp_path / "c.incomplete"
    process_code = f"""
{SMALL_PARTS}
import os, luban.corpus.engine.local as local
run = local.run_task
def once(task, report):
    run(task, report)
    os._exit(9)
local.run_task = once
from luban.corpus.build import build_corpus
build_corpus([{str(copy)!r}], {str(tmp_path / "c")!r})
"""
    assert subprocess.run([sys.executable, "-c", process_code], env=ENVIRONMENT, check=False).returncode == 9
    assert len(list(unfinished.glob("work/phase-0/*.json"))) == 1
    copy.write_text(source.read_text().replace("short", "brief"))
    with pytest.raises(ArtifactError, match="input has changed"):
        build_corpus([str(copy)], tmp_path / "c")
    build_corpus([str(copy)], tmp_path / "c")
    assert "brief" in {d.text for d in read_corpus(tmp_path / "c")}


def test_too_much_that_is_unusable_is_refused_with_samples(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "good one"}\n' * 9 + "rubbish\n")
    with pytest.raises(DataError, match=r"1 invalid JSON lines, such as in.jsonl at byte 189.*--bad-share"):
        build_corpus([str(path)], tmp_path / "c", steps=())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]
    figures = build_corpus([str(path)], tmp_path / "c", steps=(), bad_share=0.1)
    assert figures["unusable"] == {"invalid JSON lines": 1} and figures["train"]["documents"] > 5


def test_errors_of_workers_come_back(source, tmp_path):
    broken = tmp_path / "b.parquet"
    broken.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        build_corpus([str(source), str(broken)], tmp_path / "c", workers=2, bad_share=0.0)
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"a\0b")
    with pytest.raises(DataError, match=r"b\.txt is binary, not text"):
        build_corpus([str(source), str(binary)], tmp_path / "c", workers=2)
    assert not (tmp_path / "c.incomplete").exists()
    with pytest.raises(ConfigError, match="at least 1"):
        build_corpus([str(source)], tmp_path / "c", workers=0)
    with pytest.raises(ConfigError, match="unknown executor 'cloud'"):
        build_corpus([str(source)], tmp_path / "c", on="cloud")


@pytest.mark.slow
def test_ray_writes_the_same_bytes(source, tmp_path):
    pytest.importorskip("ray")
    build_corpus([str(source)], tmp_path / "local", steps=STEPS)
    build_corpus([str(source)], tmp_path / "ray", steps=STEPS, workers=2, on="ray")
    assert content(tmp_path / "local") == content(tmp_path / "ray")


@pytest.mark.slow
def test_a_build_on_ray_that_was_killed_goes_on_and_writes_the_same_bytes(source, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("luban.corpus.sources.jsonl.PART_BYTES", 4_000)
    code = f"""
import os
import luban.corpus.sources.jsonl as j; j.PART_BYTES = 4_000
from luban.core.log import Bar
advance, tasks = Bar.advance, []
def count(self, *amounts):
    advance(self, *amounts)
    tasks.append(self.title)
    if len(tasks) == 3:
        os.kill(os.getpid(), {signal.SIGKILL:d})
Bar.advance = count
from luban.corpus.build import build_corpus
build_corpus([{str(source)!r}], {str(tmp_path / "c")!r}, steps={STEPS!r}, workers=2, on="ray")
"""
    work = tmp_path / "c.incomplete" / "work"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False).returncode == -signal.SIGKILL
    time.sleep(1)  # tasks that were running end by themselves
    done = {path: path.stat().st_mtime_ns for path in work.glob("phase-0/*.json")}
    assert len(done) >= 3 and not (tmp_path / "c").exists()
    kept = []

    def watch(self, tasks, bar, run=RayExecutor.run):
        kept.extend(path for path, time_ns in done.items() if path.stat().st_mtime_ns == time_ns)
        run(self, tasks, bar)

    monkeypatch.setattr(RayExecutor, "run", watch)
    build_corpus([str(source)], tmp_path / "c", steps=STEPS, workers=2, on="ray")
    assert set(kept) == set(done)  # nothing that was done was done again
    build_corpus([str(source)], tmp_path / "local", steps=STEPS, workers=4)
    assert content(tmp_path / "local") == content(tmp_path / "c")


@pytest.mark.slow
def test_errors_of_ray_tasks_come_back(tmp_path):
    pytest.importorskip("ray")
    for name in ("a", "b"):
        (tmp_path / f"{name}.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a Parquet file"):
        build_corpus([str(tmp_path / "*.parquet")], tmp_path / "c", on="ray")
    assert not (tmp_path / "c.incomplete").exists()


class Deadly:
    """Kills the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.slow
def test_a_part_that_kills_its_workers_is_given_up(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr("luban.corpus.engine.ray.RETRIES", 1)
    with RayExecutor(1) as executor, pytest.raises(WorkerLost, match="Ray gave up"):
        executor.run([Deadly()], Bar("", None, "docs"))
