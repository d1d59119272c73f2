"""What grows with size: the text's rules, questions that stand in no document, figures by hand, and the whole way through the verb."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from evals_shared import read_json, read_lines

from luban.cli.main import main
from luban.evals.emergence import SHOTS, documents, growth, held_out, sharpness, write_tasks
from luban.evals.spec import load_tasks
from luban.report.emergence import emergence_page


def test_documents_follow_their_rules_and_hold_no_question_of_a_task(tmp_path):
    seed = int(np.random.default_rng().integers(1 << 30))
    asked: set[str] = set()
    for path in write_tasks(tmp_path, 200, seed):
        name = path.rpartition("/")[2].removesuffix(".toml")
        rows = read_lines(tmp_path / f"{name}.jsonl")
        assert len(rows) == 200 and load_tasks(path)[0].name == name
        asked |= {row["question"] for row in rows if not name.startswith("rule")}
        for row in rows:
            if name.startswith("sums"):
                assert row["answer"] == str(sum(map(int, re.findall(r"\d", row["question"]))) % 10)
            elif name == "addition":
                assert row["answer"] == f"{sum(map(int, re.findall(r'[0-9]+', row['question'])))}\n"
            else:
                *shown, last = row["question"].split()
                assert len(shown) == (SHOTS if name == f"rule_{SHOTS}" else 0)
                moves = {(ord(pair[2]) - ord(pair[0])) % 26 for pair in [*shown, last + row["answer"]]}
                assert len(moves) == 1 and 0 not in moves
    seen = set()
    for row in documents(300, seed):
        for line in row["text"].splitlines():
            if found := re.fullmatch(r"(\d+)\+(\d+)=(\d+)", line):
                assert int(found[1]) + int(found[2]) == int(found[3])
                seen.add(f"{found[1]}+{found[2]}=")
            elif found := re.fullmatch(r"(now|steps) ([\d ]+):([\d ]+)", line):
                sums = np.cumsum([int(each) for each in found[2].split()]) % 10
                assert found[3] == (str(sums[-1]) if found[1] == "now" else " ".join(map(str, sums)))
                assert not held_out(found[2])
                seen |= {f"now {found[2]}:", f"steps {found[2]}:"}
            else:
                assert len({(ord(pair[2]) - ord(pair[0])) % 26 for pair in line.split()}) == 1
    assert len(seen) > 500 and not seen & asked


def test_sharpness_is_1_for_a_jump_and_small_for_a_line():
    assert sharpness([0, 0, 1, 1]) == 1 and sharpness([3, 2, 1, 0]) == pytest.approx(1 / 3)
    assert sharpness([0.5, 0.5]) == 0
    line = np.linspace(0.1, 0.9, 9)  # a token's likelihood that rises evenly; eight must be right for a whole answer
    assert sharpness(line.tolist()) == pytest.approx(1 / 8) and sharpness((line**8).tolist()) > 0.5


def test_gains_are_differences_of_the_evaluations():
    names = (
        "rule_0/acc",
        f"rule_{SHOTS}/acc",
        "sums_now/number",
        "sums_steps/number",
        "addition/acc",
        "addition/nats_per_token",
    )
    values = np.random.default_rng().random((3, len(names)))
    results = [{name: {"value": value} for name, value in zip(names, row, strict=True)} for row in values]
    found = growth(results)
    assert found["gain in context"] == pytest.approx(values[:, 1] - values[:, 0])
    assert found["gain by steps"] == pytest.approx(values[:, 3] - values[:, 2])
    assert found["likelihood of a token"] == pytest.approx([math.exp(-nats) for nats in values[:, 5]])
    page = emergence_page([1e3, 1e4, 1e5], found, {"whole answer right": 0.5})
    assert page.count("<svg") == 3 and "whole answer right 0.50" in page and f"{values[2, 1]:.3f}" in page


def test_what_is_not_right_is_refused_in_one_line(tmp_path, capsys):
    for words, said in (
        (["--documents", "5"], "--documents is at least 100"),
        (["--ratio", "x"], "--ratio takes a number above 0"),
        (["--widths", "8", "16"], "at least three different widths"),
        (["--widths", "8", "16", "20"], "multiples of 8"),
    ):
        assert main(["scaling", "emergence", "luban_emergence_cpu", "--out", str(tmp_path / "out"), *words]) == 2
        printed = capsys.readouterr().err
        assert said in printed and len(printed.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_verb_trains_evaluates_and_draws_and_a_second_call_reads(tmp_path, capsys):
    words = [
        "scaling",
        "emergence",
        "luban_emergence_cpu",
        "--out",
        str(tmp_path),
        "--widths",
        "8",
        "16",
        "24",
        "--ratio",
        "4",
    ]
    words += ["--documents", "200", "--items", "6"]
    assert main(words) == 0
    first = read_json(tmp_path / "emergence.json")
    assert first["widths"] == [8, 16, 24] and all(0 <= v <= 1 for v in first["likelihood of a token"])
    assert (tmp_path / "emergence.html").read_text().count("<svg") == 3
    (tmp_path / "emergence.json").unlink()
    capsys.readouterr()
    assert main(words) == 0 and read_json(tmp_path / "emergence.json") == first
    assert "finished" in capsys.readouterr().err
