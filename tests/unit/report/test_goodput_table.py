"""The table of a run's seconds: shares of the whole, and what an elastic run went through."""

from __future__ import annotations

import pytest

from luban.core.artifact import ArtifactWriter
from luban.core.log import Metrics
from luban.report.goodput import failures_line, goodput_rows
from luban.report.page import write_report
from luban.train.goodput import KINDS

SPENT = {"compute": 60.0, "communication": 20.0, "data": 1.0, "checkpoint": 4.0, "lost": 10.0, "idle": 5.0}
ELASTIC = {
    "generations": 3,
    "lost_workers": 2,
    "stragglers": ["b/1"],
    "rows": {"first": 0, "steps": 10, "rows": 80, "wrong": []},
}


def test_shares_are_of_all_seconds():
    rows = goodput_rows({"goodput": {**SPENT, "wall": 100.0}})
    assert {row["name"]: row["share"] for row in rows} == SPENT  # of 100 seconds
    assert [row["name"] for row in rows] == list(KINDS) and goodput_rows({}) == []
    assert sum(row["share"] for row in rows) == pytest.approx(100)


def test_failures_are_said():
    line = failures_line({"elastic": ELASTIC})
    assert "workers lost: 2; 80 rows of 10 steps were each used once. Slow workers: b/1." in line
    wrong = {**ELASTIC, "rows": {**ELASTIC["rows"], "wrong": [4]}}
    assert "rows of 1 steps were not used exactly once" in failures_line({"elastic": wrong}) and failures_line({}) == ""


def test_the_page_shows_them(tmp_path):
    with ArtifactWriter(tmp_path / "run", kind="run", config={"x": 1}) as art:
        metrics = Metrics(art.path / "metrics.jsonl")
        for step in range(1, 4):
            metrics.write(step=step, loss=1.0 / step, tokens=step)
        metrics.close()
        art.note(goodput=SPENT, elastic=ELASTIC)
    write_report([tmp_path], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "where the time went" in page and "workers lost: 2" in page and "steps that were done again" in page
