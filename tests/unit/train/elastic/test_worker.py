"""A worker that opens a run directory which another process was killed in before the run had begun."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from luban.parallel.world import World
from luban.train.elastic import worker
from luban.train.elastic.link import RankAssignment
from luban.train.elastic.worker import ElasticRun


@pytest.mark.parametrize("figures", [{}, {"accelerator": "cpu"}])
def test_copies_of_the_run_before_go_unless_this_one_has_begun(tmp_path, monkeypatch, figures):
    copy = tmp_path / "a" / "g7-r0-0.flash"
    copy.parent.mkdir()
    copy.touch()
    asked: list[str] = []
    run = ElasticRun.__new__(ElasticRun)
    run.recipe = run.out = run.name = None
    run.opened, run.base = (None,) * 4, tmp_path
    run.link = SimpleNamespace(client=lambda operation, **_: asked.append(operation))
    art = SimpleNamespace(finished=lambda: False, resumed=True, figures=figures)
    monkeypatch.setattr(run, "_fitted", lambda assignment: None)
    monkeypatch.setattr(run, "_meet", lambda assignment, recipe: World())
    monkeypatch.setattr(run, "_train", lambda *_: asked.append("trains"))
    monkeypatch.setattr(worker, "run_artifact", lambda *_, **__: art)
    monkeypatch.setattr(worker, "opened_together", lambda art, world: nullcontext(art))
    monkeypatch.setattr(worker, "predict_run", lambda *_: None)
    monkeypatch.setattr(worker, "begin", lambda *_: asked.append("begins"))
    run._generation(RankAssignment(1, 0, ("a/0",)))
    assert asked == [*(() if figures else ("run_begins", "begins")), "trains", "end"]
    assert copy.exists() == bool(figures)
