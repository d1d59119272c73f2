"""The micro-batch that is chosen: the largest that fit by prediction, and the fastest of those by measurement."""

from __future__ import annotations

import json

import pytest
from training_data import make_shards

from luban.cli.main import main
from luban.core.errors import UnsupportedError
from luban.train import tune as tuning
from luban.train.recipe import DataConfig, Recipe, TrainConfig


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Recipe:
    shards = make_shards(tmp_path_factory.mktemp("tune"))
    return Recipe(data=DataConfig(path=str(shards)), train=TrainConfig(batch_size=12, seq_len=16, device="cpu"))


def predicted(monkeypatch, limit: int, row: int = 100):
    """Predictions of `row` bytes a row, of which `limit` fit."""

    class Total:
        def __init__(self, total):
            self.total = total

    class Found:
        def __init__(self, rows):
            self.memory, self.step, self.available_bytes = Total(row * rows), Total(0.1), limit

    monkeypatch.setattr(tuning, "predict", lambda r, *_: Found(r.train.batch_size // r.train.accumulate))


def test_the_two_largest_that_fit_are_measured_and_the_faster_wins(recipe, monkeypatch):
    predicted(monkeypatch, 450)
    times = {3: 2.0, 4: 1.5, 6: 0.1}
    found = tuning.tune(recipe, measure=lambda r: times[r.train.accumulate])
    assert [(t.accumulate, t.fits) for t in found] == [(1, False), (2, False), (3, True), (4, True)]
    assert tuning.best(found).accumulate == 4


def test_what_runs_out_of_memory_after_all_is_passed_over(recipe, monkeypatch):
    predicted(monkeypatch, 10**6)
    found = tuning.tune(recipe, measure=lambda r: None if r.train.accumulate < 3 else 1.0 / r.train.accumulate)
    assert [t.accumulate for t in found if t.seconds is not None] == [3, 4]
    assert [t.fits for t in found[:2]] == [False, False]


def test_nothing_that_fits_says_what_would(recipe, monkeypatch):
    predicted(monkeypatch, 50)
    with pytest.raises(UnsupportedError, match=r"one of 1 rows would need 100 B; use --plan\.remat full"):
        tuning.tune(recipe)


def test_on_the_command_line(recipe, capsys):
    words = ["bench", "micro-batch", "tiny_pretrain_cpu", "--data.path", recipe.data.path]
    words += ["--train.batch_size", "4", "--train.seq_len", "16", "--train.compile", "false", "--model.layers", "1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [t["accumulate"] for t in found["trials"]] == [1, 2]
    assert found["accumulate"] in (1, 2) and all(t["seconds"] > 0 for t in found["trials"])
