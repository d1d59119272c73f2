"""Two processes measure collectives, and what was fitted to them predicts them."""

import json

import pytest


@pytest.mark.slow
def test_two_processes_measure_and_predict(luban, tmp_path):
    out = tmp_path / "fit.json"
    words = (
        "--nproc",
        2,
        "--fit",
        "--device",
        "cpu",
        "--sizes",
        "4k",
        "16k",
        "64k",
        "256k",
        "--repeats",
        2,
        "--json",
        out,
    )
    code, err = luban("bench", "collectives", *words)
    assert code == 0, err
    found = json.loads(out.read_text())
    assert found["backend"] == "gloo" and found["beta_seconds_a_byte"] > 0
    assert len(found["predictions"]) == 16 and len(found["rows"]) == 16
