"""Every form of feedback as data for every use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from luban.align.feedback import conditioned_prompt, convert
from luban.align.preferences import read_groups
from luban.core.errors import DataError

SCORED = {"prompt": "q", "responses": ["bad", "good", "fair"], "scores": [1, 9, 5]}
CRITIQUE = {"prompt": "q", "response": "bad", "critique": "It is bad.", "revision": "good"}


def converted(tmp_path: Path, row: dict, use: str) -> list[dict]:
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    count = convert(tmp_path / "in.jsonl", tmp_path / "out.jsonl", use)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == count
    return rows


def said(rows: list[dict]) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def test_scores_and_critiques_in_every_form(tmp_path):
    assert said(converted(tmp_path, SCORED, "preferred")) == ["good"]
    assert said(converted(tmp_path, CRITIQUE, "revised")) == ["good"]
    assert said(converted(tmp_path, CRITIQUE, "critic")) == ["It is bad.\n\ngood"]
    pairs = {(row["chosen"], row["rejected"]) for row in converted(tmp_path, SCORED, "pairs")}
    assert pairs == {("good", "bad"), ("good", "fair"), ("fair", "bad")}
    assert [row["chosen"] for row in converted(tmp_path, CRITIQUE, "pairs")] == ["good"]
    labels = {row["completion"]: row["label"] for row in converted(tmp_path, SCORED, "unpaired")}
    assert labels["good"] and not labels["bad"]


def test_rankings_and_pairs_are_what_reward_models_read(tmp_path):
    for use, answers in (("rankings", 3), ("pairs", 2), ("unpaired", 1)):
        converted(tmp_path, SCORED, use)
        assert all(len(group.answers) == answers for _, group in read_groups(tmp_path / "out.jsonl"))


def test_conditioning_asks_for_the_score_that_the_response_has(tmp_path):
    rows = converted(tmp_path, SCORED, "conditioned")
    asked = {row["messages"][-1]["content"]: row["messages"][0]["content"] for row in rows}
    wanted = {text: int(prompt.partition(": ")[2].partition(".")[0]) for text, prompt in asked.items()}
    assert wanted["bad"] < wanted["fair"] <= wanted["good"]
    most = int(next(iter(asked.values())).partition("1 to ")[2].partition(":")[0])
    assert wanted["good"] == most
    assert conditioned_prompt("q", most, most)[0]["content"] == asked["good"]


def test_feedback_that_a_use_can_not_take_is_refused(tmp_path):
    with pytest.raises(DataError, match="critique and revision, which --use revised needs"):
        converted(tmp_path, SCORED, "revised")
    for row, message in (
        ({"prompt": "q"}, r"in\.jsonl:1: a row needs"),
        ({**SCORED, "scores": ["high", 2, 3]}, r"in\.jsonl:1: ranks and scores are finite numbers"),
        ({**SCORED, "responses": "bad"}, r"in\.jsonl:1: responses need a list"),
        ({**CRITIQUE, "response": 3}, r"in\.jsonl:1: a prompt or an answer is text"),
    ):
        with pytest.raises(DataError, match=message):
            converted(tmp_path, row, "pairs")


def test_the_lowest_score_is_never_wanted(tmp_path):
    few = {"prompt": "q", "responses": [*"abcdefghij"], "scores": [0] * 9 + [1]}
    assert [row["completion"] for row in converted(tmp_path, few, "unpaired") if row["label"]] == ["j"]
    with pytest.raises(DataError, match="responses with different scores"):
        converted(tmp_path, {**few, "scores": [1] * 10}, "unpaired")
