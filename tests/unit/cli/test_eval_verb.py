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
        (["TASK", "--out", "OUT", "--temperature", "-0.5"], "--temperature is a number from 0, -0.5 given", 2),
    ],
)
def test_errors_are_one_line(tiny_checkpoint, tmp_path, capsys, arguments, said, code):
    task = write_task(tmp_path, "colours", CHOICE, COLOURS)
    words = [{"OUT": str(tmp_path / "out"), "TASK": task}.get(word, word) for word in arguments]
    assert main(["eval", str(tiny_checkpoint), *words]) == code
    printed = capsys.readouterr()
    assert said in printed.err and len(printed.err.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_shipped_tasks_are_sampled_by_options_alone(tiny_checkpoint, tmp_path, capsys):
    words = ["eval", str(tiny_checkpoint), "arithmetic_add_2", "--limit", "2", "--repeats", "3"]
    assert main([*words, "--out", str(tmp_path / "greedy")]) == 2
    assert "give --temperature" in capsys.readouterr().err
    assert main([*words, "--temperature", "1.5", "--out", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert all(len(set(row["raws"])) > 1 for row in rows) and len(rows[0]["raws"]) == 3
    spec = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]["tasks"]["arithmetic_add_2"]["spec"]
    assert spec["kind"]["temperature"] == 1.5 and spec["repeats"] == 3


@pytest.mark.parametrize("task", ["answer_loss", "which_module", "samples"])
def test_documents_of_another_kind_than_a_task_needs_are_named_before_anything_is_measured(
    tiny_checkpoint, tmp_path, capsys, task
):
    texts = "\n".join(json.dumps({"text": f"document {i} " * 20}) for i in range(60))
    (tmp_path / "texts.jsonl").write_text(texts)
    corpus = str(tmp_path / "corpus")
    assert main(["corpus", "build", str(tmp_path / "texts.jsonl"), "--out", corpus, "--heldout", "0.3"]) == 0
    words = ["eval", str(tiny_checkpoint), "bits_per_byte", task, "--corpus", corpus, "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().err
    assert f"{task} needs held-out conversations" in said and "bits_per_byte:" not in said
