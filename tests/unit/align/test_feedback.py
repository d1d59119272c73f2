"""Every form of feedback as data for every use."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from luban.align.feedback import Feedback, conditioned_prompt, convert, standardised
from luban.align.preferences import read_groups
from luban.core import log
from luban.core.errors import DataError
from luban.evals.judges.pairs import read_pairs

SCORED = {"prompt": "q", "responses": ["bad", "good", "fair"], "scores": [1, 9, 5]}
CRITIQUE = {"prompt": "q", "response": "bad", "critique": "It is bad.", "revision": "good"}


def converted(tmp_path: Path, *rows: dict, use: str) -> list[dict]:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    count = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", use)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == count
    return rows


def said(rows: list[dict]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def test_scores_and_critiques_in_every_form(tmp_path):
    assert said(converted(tmp_path, SCORED, use="preferred")) == ["good"]
    assert said(converted(tmp_path, CRITIQUE, use="revised")) == ["good"]
    assert said(converted(tmp_path, CRITIQUE, use="critic")) == ["It is bad.\n\ngood"]
    pairs = {(row["chosen"], row["rejected"]) for row in converted(tmp_path, SCORED, use="pairs")}
    assert pairs == {("good", "bad"), ("good", "fair"), ("fair", "bad")}
    assert [row["chosen"] for row in converted(tmp_path, CRITIQUE, use="pairs")] == ["good"]
    labels = {row["completion"]: row["label"] for row in converted(tmp_path, SCORED, use="unpaired")}
    assert labels["good"] and not labels["bad"]


def test_rankings_and_pairs_are_what_reward_models_read(tmp_path):
    for use, answers in (("rankings", 3), ("pairs", 2), ("unpaired", 1)):
        converted(tmp_path, SCORED, use=use)
        assert all(len(group.answers) == answers for _, group in read_groups(tmp_path / "out.jsonl"))


def test_conditioning_asks_for_the_score_that_the_response_has(tmp_path):
    rows = converted(tmp_path, SCORED, use="conditioned")
    asked = {row["messages"][-1]["content"]: row["messages"][0]["content"] for row in rows}
    wanted = {text: int(prompt.partition(": ")[2].partition(".")[0]) for text, prompt in asked.items()}
    assert wanted["bad"] < wanted["fair"] <= wanted["good"]
    most = int(next(iter(asked.values())).partition("1 to ")[2].partition(":")[0])
    assert wanted["good"] == most
    assert conditioned_prompt("q", most, most)[0]["content"] == asked["good"]


def test_pairs_as_alpaca_eval_publishes_them_are_those_that_judges_read(tmp_path):
    draw = random.Random(5)
    rows: list[dict] = [
        {
            "instruction": f"q{i}",
            "output_1": f"a{i}",
            "output_2": f"b{i}",
            "generator_2": "other",
            "annotator": draw.choice(["x", "y"]),
            draw.choice(["preference", "preferred"]): draw.choice([0, 1, 1.2, 1.5, 1.8, 2]),
        }
        for i in range(60)
    ]
    pairs = converted(tmp_path, *rows, use="pairs")
    matches = [each for each in read_pairs(tmp_path / "in.jsonl") if each.human != "tie"]
    wanted = [each.answers if each.human == "first" else each.answers[::-1] for each in matches]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs] == [
        (each.prompt, *texts) for each, texts in zip(matches, wanted, strict=True)
    ]
    assert 0 < len(pairs) < 60 and len(list(read_groups(tmp_path / "out.jsonl"))) == len(pairs)
    assert said(converted(tmp_path, *rows, use="preferred")) == [texts[0] for texts in wanted]


def test_scores_are_standardised_by_annotator(tmp_path):
    """A strict and a lenient annotator who agree up to a shift and a factor label the same responses as wanted."""
    draw = np.random.default_rng()
    quality = draw.permutation(np.arange(40.0)).reshape(20, 2)
    rows = [
        {"prompt": f"{name} {i}", "responses": [f"{name} {q}" for q in pair], "scores": list(shift + factor * pair)}
        | {"annotator": name}
        for name, shift, factor in (("strict", -300.0, 0.5), ("lenient", 700.0, 4.0))
        for i, pair in enumerate(quality)
    ]
    assert len({r["label"] for r in converted(tmp_path, *rows, use="unpaired") if "strict" in r["prompt"]}) == 2
    for name in ("strict", "lenient"):
        wanted = {
            float(r["completion"].split()[1])
            for r in converted(tmp_path, *rows, use="unpaired")
            if name in r["prompt"] and r["label"]
        }
        assert wanted == set(np.arange(20.0, 40.0))
    alone = [Feedback(prompt="q", responses=("a", "b"), scores=(0.1, 0.1), annotator="same")]
    assert standardised(alone)[0].scores == (0.0, 0.0)
    assert standardised([replace(alone[0], scores=(1.0, 5.0), annotator="")])[0].scores == (1.0, 5.0)


def test_rows_with_an_empty_text_are_left_out_and_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(log, "_warned", set())
    rows = [CRITIQUE, {**CRITIQUE, "response": ""}, {**CRITIQUE, "critique": ""}, {**CRITIQUE, "response": ""}]
    assert said(converted(tmp_path, *rows, use="revised")) == ["good"]
    printed = capsys.readouterr().err
    assert "2 rows are left out, since their response is empty" in printed
    assert "1 rows are left out, since their critique is empty" in printed


def test_feedback_that_a_use_can_not_take_is_refused(tmp_path):
    with pytest.raises(DataError, match="critique and revision, which --use revised needs"):
        converted(tmp_path, SCORED, use="revised")
    for row, message in (
        ({"prompt": "q"}, r"in\.jsonl:1: a row needs"),
        ({**SCORED, "scores": ["high", 2, 3]}, r"in\.jsonl:1: ranks and scores are finite numbers"),
        ({**SCORED, "responses": "bad"}, r"in\.jsonl:1: responses need a list"),
        (
            {"instruction": "q", "output_1": "a", "output_2": "b"},
            r"in\.jsonl:1: a pair needs its preference .*luban annotate",
        ),
        (
            {"instruction": "q", "output_1": "a", "preference": 1},
            r"in\.jsonl:1: a row needs instruction, output_1 and output_2",
        ),
        ({"instruction": "q", "output_1": "a", "output_2": "b", "preference": 7}, r"in\.jsonl:1: a preference is 1, 2"),
        ({**CRITIQUE, "response": 3}, r"in\.jsonl:1: a prompt or an answer is text"),
    ):
        with pytest.raises(DataError, match=message):
            converted(tmp_path, row, use="pairs")


def test_the_lowest_score_is_never_wanted(tmp_path):
    few = {"prompt": "q", "responses": [*"abcdefghij"], "scores": [0] * 9 + [1]}
    assert [row["completion"] for row in converted(tmp_path, few, use="unpaired") if row["label"]] == ["j"]
    with pytest.raises(DataError, match="responses with different scores"):
        converted(tmp_path, {**few, "scores": [1] * 10}, use="unpaired")
