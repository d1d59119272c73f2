"""`luban eval` at the command line: what it prints and writes, and errors of one line."""

from __future__ import annotations

import json

import pytest
from evals_shared import CHOICE, COLOURS, write_task

from luban.cli.main import main


def test_figures_are_printed_with_intervals_and_written(tiny_checkpoint, tmp_path, capsys):
    task = write_task(tmp_path, "colours", CHOICE, COLOURS)
    assert (
        main(["eval", str(tiny_checkpoint), task, "--shots", "0", "--limit", "3", "--out", str(tmp_path / "out")]) == 0
    )
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["acc"]["n"] == 3 and f"{results['acc']['value']:.4f}" in printed and "n = 3" in printed
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 3
    assert (
        main(["eval", str(tiny_checkpoint), task, "--shots", "0", "--limit", "3", "--out", str(tmp_path / "out")]) == 0
    )
    assert capsys.readouterr().out == printed
    assert main(["eval", str(tiny_checkpoint), task, "--shots", "0", "--out", str(tmp_path / "out")]) == 1
    assert "a finished evaluation of another configuration (config.limit was 3, now 0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["--out", "OUT"], "name at least one task", 2),
        (["lambda", "--out", "OUT"], "unknown task 'lambda' (did you mean 'lambada'?)", 2),
        (["lambada", "--out", "OUT", "--data", "none.jsonl"], "none.jsonl does not exist", 1),
        (["missing.toml", "--out", "OUT"], "missing.toml does not exist", 2),
        (["TASK", "--out", "OUT", "--limit", "-1"], "numbers from 0", 2),
        (["TASK", "--out", "OUT", "--chat", "yes"], "invalid choice 'yes'", 2),
        (["TASK", "TASK", "--out", "OUT"], "is named twice", 2),
        (["TASK", "--out", "OUT", "--judge", "rule:longst"], "did you mean 'longest'", 2),
        (["bits_per_byte", "--out", "OUT"], "pass --corpus DIR", 2),
    ],
)
def test_errors_are_one_line(tiny_checkpoint, tmp_path, capsys, arguments, said, code):
    task = write_task(tmp_path, "colours", CHOICE, COLOURS)
    words = [{"OUT": str(tmp_path / "out"), "TASK": task}.get(word, word) for word in arguments]
    assert main(["eval", str(tiny_checkpoint), *words]) == code
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
