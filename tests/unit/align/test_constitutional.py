"""Revision chains and soft labels of a scripted model: what is asked, what is kept, clamping, the loss's minimum."""

from __future__ import annotations

import json
import math

import pytest
from evals_shared import Scripted, read_lines

from luban.align.constitutional import RevisionConfig, prefer, revise, soft_label
from luban.align.feedback import convert
from luban.align.preferences import read_groups
from luban.cli.main import main
from luban.core.errors import DataError, UnfinishedError
from luban.evals.checklist import Principle, Principles, read_principles
from luban.evals.judges.pairs import Match
from luban.evals.requests import Failed, Score, Scored


def prompts(tmp_path, count=5):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(count)))
    return file


def say(request):
    last = request.prompt[-1]["content"]
    if last.startswith("ask"):
        return "rude"
    return "It is rude." if last.startswith("Say") else f"polite {len(request.prompt)}"


def test_answers_are_criticised_and_revised_by_principles_that_are_drawn(tmp_path):
    backend, principles = Scripted(say), read_principles()
    found = revise(prompts(tmp_path, 12), backend, principles, tmp_path / "out", RevisionConfig(rounds=2))
    rows = read_lines(tmp_path / "out" / "revisions.jsonl")
    assert found == {"prompts": 12, "changed": 12, "empty": 0} and len(backend.asked) == 12 * 5
    known = {p.id: p for p in principles.principle}
    assert len({step["principle"] for row in rows for step in row["steps"]}) > 2
    for row in rows:
        assert row["response"] == "rude" and row["critique"] == "It is rude." and row["revision"] == "polite 5"
        assert [step["principle"] in known for step in row["steps"]] == [True, True]
    second = [r.prompt for r in backend.asked if len(r.prompt) == 5]
    assert all([m["role"] for m in prompt] == ["user", "assistant", "user", "assistant", "user"] for prompt in second)
    assert any(prompt[1]["content"] == "polite 5" for prompt in second)  # the second round revises the first's revision
    assert convert(tmp_path / "out" / "revisions.jsonl", tmp_path / "sft.jsonl", "revised") == 12
    assert read_lines(tmp_path / "sft.jsonl")[0]["messages"][-1]["content"] == "polite 5"


def test_rows_in_which_the_model_says_nothing_are_left_out(tmp_path):
    def silent(request):
        return "" if len(request.prompt) == 5 and request.prompt[0]["content"] in ("ask 1", "ask 4") else say(request)

    found = revise(prompts(tmp_path), Scripted(silent), read_principles(), tmp_path / "out", RevisionConfig(rounds=1))
    assert found == {"prompts": 5, "changed": 3, "empty": 2}
    assert convert(tmp_path / "out" / "revisions.jsonl", tmp_path / "sft.jsonl", "revised") == 3
    with pytest.raises(DataError, match="none of 5 prompts"):
        revise(prompts(tmp_path), Scripted(lambda _: ""), read_principles(), tmp_path / "none", RevisionConfig())


def test_an_interrupted_chain_goes_on(tmp_path):
    file, principles = prompts(tmp_path), read_principles()
    down = Scripted(
        lambda r: Failed(error="down") if r.prompt[0]["content"] == "ask 3" and len(r.prompt) > 1 else say(r)
    )
    with pytest.raises(UnfinishedError, match=r"1 of 5 requests have no answer \(down\)"):
        revise(file, down, principles, tmp_path / "out", RevisionConfig(rounds=1))
    up = Scripted(say)
    revise(file, up, principles, tmp_path / "out", RevisionConfig(rounds=1))
    assert len(up.asked) == 1 + 5


def test_soft_labels_are_likelihoods_clamped_after_a_chain_of_thought():
    assert soft_label(0.0, clamped=False) == 0.5 and soft_label(math.log(3), clamped=False) == pytest.approx(0.75)
    assert soft_label(5.0, clamped=True) == 0.6 and soft_label(-5.0, clamped=True) == 0.4
    assert soft_label(math.log(0.55 / 0.45), clamped=True) == pytest.approx(0.55)
    assert soft_label(-1e9, clamped=False) == pytest.approx(0)


def label(request):
    """Likes A by 1 wherever it stands, and the polite answer by 2."""
    if not isinstance(request, Score):
        return "because"
    text = request.context[0]["content"]
    polite = "A" if "(A) polite" in text else "B"
    return Scored(
        logprob=(1.0 if request.continuation == "A" else 0.0) + (2.0 if request.continuation == polite else 0.0) - 9,
        greedy=True,
        tokens=1,
    )


def test_preferences_have_probabilities_and_no_liking_for_a_letter(tmp_path):
    matches = [
        Match(
            id=str(i),
            prompt=f"p{i}",
            first="a",
            second="b",
            answers=("polite", "rude")[:: 1 if i % 2 else -1],
            human="first" if i % 2 else "second",
        )
        for i in range(8)
    ]
    found = prefer(matches, Scripted(label), read_principles(), tmp_path / "out")
    rows = read_lines(tmp_path / "out" / "preferences.jsonl")
    assert all(
        row["chosen"] == "polite" and row["probability"] == pytest.approx(1 / (1 + math.exp(-2))) for row in rows
    )
    assert found["human_agreement"] == 1
    assert [group.probability for _, group in read_groups(tmp_path / "out" / "preferences.jsonl")] == [
        pytest.approx(0.8808, abs=1e-3)
    ] * 8
    thought = prefer(matches, Scripted(label), read_principles(), tmp_path / "cot", chain_of_thought=True)
    assert thought["mean_probability"] == pytest.approx(0.6)
    # all are right: labels of 0.88 are short of it by 0.12, clamped ones by 0.4
    for figures in (found, thought):
        assert figures["calibration_error"] == pytest.approx(1 - 1 / (1 + math.exp(-2)))
        assert figures["calibration_error_clamped"] == pytest.approx(0.4)
    assert read_lines(tmp_path / "cot" / "preferences.jsonl")[0]["log_odds"] == pytest.approx(2.0)


def test_the_ranking_loss_is_least_where_the_models_probability_is_the_soft_label():
    import torch

    from luban.objectives.ranking_losses import ranking_loss

    ranks, present = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)

    def loss(gap):
        scores = torch.tensor([[gap, 0.0]], dtype=torch.float64)
        return ranking_loss(scores, ranks, present, torch.zeros(1), torch.tensor([0.7])).item()

    least = math.log(0.7 / 0.3)
    assert all(loss(least) < loss(least + move) for move in (-1.0, -0.1, -0.01, 0.01, 0.1, 1.0))


def test_what_is_not_right_is_refused_in_one_line(tmp_path, capsys):
    bare = Principles(principle=(Principle(id="a", text="t"),))
    with pytest.raises(DataError, match="no principle has requests"):
        revise(prompts(tmp_path), Scripted(say), bare, tmp_path / "o", RevisionConfig())
    (tmp_path / "x.jsonl").write_text('{"no": 1}\n')
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "p", "output_1": "a", "output_2": "b"}\n')
    for words, said in (
        (["annotate", str(pairs), "--constitution", "shipped"], "--judge MODEL"),
        (["annotate", str(pairs), "--constitution", "none.toml", "--judge", "x"], "does not exist"),
    ):
        assert main([*words, "--out", str(tmp_path / "o")]) == 2
        printed = capsys.readouterr().err
        assert said in printed and len(printed.strip().splitlines()) == 1
