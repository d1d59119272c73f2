"""People's labels: sides drawn, kept through a crash, agreement, export; routes that want a key."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from evals_shared import read_lines

from luban.align.annotate.labels import LabelStore, PersonLabel, export_labels
from luban.align.preferences import read_groups
from luban.cli.main import main
from luban.core.errors import DataError, UsageError
from luban.evals.judges.pairs import Match


def matches(count=6):
    return [
        Match(id=str(i), prompt=f"p{i}", first="a", second="b", answers=(f"one {i}", f"two {i}")) for i in range(count)
    ]


def better(store, pair, who, answer, **fields):
    """Prefer the answer of this text, on whichever side it is shown."""
    shown = store.shown(pair, who)
    side = "left" if shown["left"] == answer else "right"
    store.label(pair, who, PersonLabel(choice=side, grade=1, **fields))


def test_labels_are_of_the_answer_whatever_side_it_was_shown_on(tmp_path):
    with LabelStore(tmp_path / "l.sqlite", matches(40), {"ann": "k1", "ben": "k2"}) as store:
        lefts = {store.shown(i, "ann")["left"].split()[0] for i in range(40)}
        assert lefts == {"one", "two"}
        for i in range(40):
            better(store, i, "ann", f"two {i}", unsafe_left=True)
        assert all(row["preference"] == "second" for row in store.rows())
        for row in store.rows():
            assert (row["unsafe_first"], row["unsafe_second"]) == ((0, 1) if row["swapped"] else (1, 0))
        assert store.next_pair("ann") is None and store.next_pair("ben") is not None


def test_agreement_is_live_and_ties_are_labels_too(tmp_path):
    with LabelStore(tmp_path / "l.sqlite", matches(), {"ann": "k1", "ben": "k2"}) as store:
        for i in range(6):
            better(store, i, "ann", f"one {i}")
        for i, text in enumerate(("one 0", "one 1", "one 2", "two 3")):
            better(store, i, "ben", text)
        (found,) = store.progress()["agreement"]
        assert found["agreement"] == 0.75 and found["n"] == 4 and found["kappa"] == 0
        store.label(0, "ben", PersonLabel(choice="tie"))
        assert store.progress()["agreement"][0]["agreement"] == 0.5
        assert store.progress()["done"] == {"ann": 6, "ben": 4}
        assert (
            store.take_back("ben") == 0 and store.progress()["done"]["ben"] == 3 and store.take_back("nobody") is None
        )


def test_labels_are_exported_as_preferences_that_reward_models_read(tmp_path):
    with LabelStore(tmp_path / "l.sqlite", matches()) as store:
        with pytest.raises(DataError, match="no label that prefers"):
            export_labels(store, tmp_path / "p.jsonl")
        better(store, 2, "annotator", "two 2", note="clearer")
        store.label(3, "annotator", PersonLabel(choice="tie"))
        assert export_labels(store, tmp_path / "p.jsonl") == 1
    (row,) = read_lines(tmp_path / "p.jsonl")
    assert row["chosen"] == "two 2" and row["rejected"] == "one 2" and row["grade"] == 1 and row["note"] == "clearer"
    ((_, group),) = read_groups(tmp_path / "p.jsonl")
    assert group.grade == 1 and group.answers[0] == "two 2"


def test_nothing_is_lost_when_the_process_is_killed(tmp_path):
    code = f"""
from pathlib import Path
from luban.align.annotate.labels import LabelStore, PersonLabel
from luban.evals.judges.pairs import Match
matches = [Match(id=str(i), prompt=f"p{{i}}", first="a", second="b", answers=(f"one {{i}}", f"two {{i}}")) for i in range(6)]
store = LabelStore(Path({str(tmp_path / "l.sqlite")!r}), matches)
for pair in range(5):
    store.label(pair, "annotator", PersonLabel(choice="left", grade=0))
    print(pair, flush=True)
import time
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    confirmed = [process.stdout.readline() for _ in range(5)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(confirmed) == 5
    with LabelStore(tmp_path / "l.sqlite", matches()) as store:
        assert [row["pair"] for row in store.rows()] == list(range(5))


def test_files_and_labels_that_are_not_right_are_refused(tmp_path):
    with LabelStore(tmp_path / "l.sqlite", matches()) as store, pytest.raises(DataError, match="there is no pair 9"):
        store.label(9, "annotator", PersonLabel(choice="tie"))
    with pytest.raises(DataError, match="labels of other pairs"):
        LabelStore(tmp_path / "l.sqlite", matches(5))
    (tmp_path / "x").write_text("not a database, certainly not one of labels")
    with pytest.raises(DataError, match="no file of labels"):
        LabelStore(tmp_path / "x", matches())
    with pytest.raises(UsageError, match="the same key"):
        LabelStore(tmp_path / "y", matches(), {"a": "k", "b": "k"})
    for fields in ({"choice": "up"}, {"choice": "left"}, {"choice": "tie", "grade": 1}, {"choice": "left", "grade": 4}):
        with pytest.raises(DataError):
            PersonLabel(**fields)


def test_routes_want_a_key_and_answer_with_the_next_pair(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient

    from luban.align.annotate.page import create_page

    with LabelStore(tmp_path / "l.sqlite", matches(2), {"ann": "k1"}) as store:
        client = TestClient(create_page(store))
        assert "Which answer is better?" in client.get("/").text
        for route in ("/api/task", "/api/label", "/api/undo", "/api/none"):
            assert (
                client.post(route, json={}).status_code == 401
                and client.get(route, headers={"X-Key": "k2"}).status_code == 401
            )
        key = {"X-Key": "k1"}
        first = client.get("/api/task", headers=key).json()
        assert first["annotator"] == "ann" and first["progress"]["done"] == {"ann": 0}
        pair = first["task"]["pair"]
        second = client.post(
            "/api/label", headers=key, json={"pair": pair, "choice": "left", "grade": 0, "note": "x"}
        ).json()
        assert second["task"]["pair"] != pair and second["progress"]["done"] == {"ann": 1}
        for wrong in (
            {},
            {"pair": 0},
            {"pair": 7, "choice": "tie"},
            {"pair": 0, "choice": "tie", "note": 3},
            {"pair": 0, "choice": "tie", "x": 1},
            [],
        ):
            answer = client.post("/api/label", headers=key, json=wrong)
            assert answer.status_code == 400 and answer.json()["error"]
        assert client.post("/api/undo", headers=key, json={}).json()["task"]["pair"] == pair


def test_labels_that_nobody_gave_are_not_exported(tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "output_1": "a", "output_2": "b"}\n')
    labels, out = tmp_path / "labels.sqlite", tmp_path / "prefs.jsonl"
    assert main(["annotate", str(pairs), "--export", str(out), "--out", str(labels)]) == 1
    assert "labels.sqlite does not exist" in capsys.readouterr().err and not labels.exists() and not out.exists()
