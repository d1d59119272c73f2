"""Two processes measure collectives, and what was fitted to them predicts them."""

import json

import pytest

SIZES = ("64k", "512k", "4M", "16M")  # far enough apart that times grow on a busy machine


@pytest.mark.slow
def test_two_processes_measure_and_predict(luban, tmp_path):
    out = tmp_path / "fit.json"
    words = ("--nproc", 2, "--fit", "--device", "cpu", "--sizes", *SIZES, "--repeats", 3, "--json", out)
    code, err = luban("bench", "collectives", *words)
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["backend"] == "gloo" and found["beta_seconds_a_byte"] > 0
    assert len(found["predictions"]) == 16 and len(found["rows"]) == 16
