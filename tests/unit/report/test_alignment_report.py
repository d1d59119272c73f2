"""A report of reward models, preference losses and reinforcement learning shows what such runs measure."""

from __future__ import annotations

import html
import json
import random
import re

import pytest
from tiny_models import write_byte_tokenizer

from luban.core.artifact import ArtifactWriter
from luban.report.alignment_run import alignment_charts, reward_model_rows, rollouts_of, tint
from luban.report.page import write_report
from luban.tokenizer.tokenizer import load_tokenizer

RL = ("reward", "kl", "entropy", "clipped_share", "ratio", "ratio_min", "ratio_max", "answer_tokens", "unfinished")
RL += ("groups_without_spread", "engine_difference", "engine_difference_max", "reward_short", "reward_rm")
RL += ("seconds/sampling", "seconds/scoring", "seconds/reading")


def run_of(folder, rows, figures, answers=()):
    """A finished run with these metrics."""
    with ArtifactWriter(folder, kind="run", config={"task": "rl"}) as art:
        (art.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_byte_tokenizer(art.path / "tokenizer")
        if answers:
            (art.path / "rollouts").mkdir()
            for number in (0, 1):
                file = art.path / "rollouts" / f"round_{number:06d}.json"
                file.write_text(json.dumps({"answers": answers if number else []}))
        art.figures |= figures
    return folder


@pytest.fixture
def answers(tmp_path):
    write_byte_tokenizer(tmp_path / "t")
    tokenizer = load_tokenizer(tmp_path / "t")
    found = []
    for i in range(40):
        ids = tokenizer.encode(f"<b>{i}")
        kl = [random.uniform(-1, 1) for _ in ids]
        found.append({"prompt": tokenizer.encode("why?"), "tokens": ids, "text": "", "finished": i != 3})
        found[-1] |= {"score": float(i), "kl": sum(kl), "token_kl": kl}
    random.shuffle(found)
    return found


def test_a_page_shows_rewards_and_answers_with_their_divergence(tmp_path, answers):
    rows = [{"step": s, "loss": 0.0, **{name: random.random() for name in RL}} for s in range(1, 30)]
    rows.append({"step": 30, "heldout_reward": 0.5, "heldout_answers": 4})
    run = run_of(tmp_path / "rl", rows, {"step": 30, "heldout_reward": 0.5}, answers)
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    for words in ("rl: reward", "KL of an answer", "entropy of a token", "ratio to the policy", "ratio is clipped"):
        assert words in page
    for words in ("tokens of an answer", "engine against trainer", "seconds of a round", "each reward", "0.500"):
        assert words in page
    assert "&lt;" in page and "<b>39" not in page  # a model's answer is text
    series = [json.loads(html.unescape(found)) for found in re.findall(r"data-chart='([^']*)'", page)]
    drawn = {each["name"] for chart in series for each in chart["series"]}
    assert {"smallest", "largest", "cut off", "groups without spread", "sampling", "scoring", "short", "rm"} <= drawn
    assert "std" not in drawn


def test_the_best_and_worst_answers_of_the_newest_round_are_shown_with_each_tokens_divergence(tmp_path, answers):
    found = rollouts_of(run_of(tmp_path / "rl", [{"step": 1, "loss": 0.0}], {}, answers))
    assert (found["round"], found["shown"], found["answers"]) == (1, 16, 40)
    assert [float(row["score"]) for row in found["rows"]] == [*range(39, 31, -1), *range(7, -1, -1)]
    by_score = {answer["score"]: answer for answer in answers}
    most = max(abs(kl) for row in found["rows"] for kl in by_score[float(row["score"])]["token_kl"])
    assert found["scale"] == most
    for row in found["rows"]:
        answer = by_score[float(row["score"])]
        assert "".join(token["text"] for token in row["tokens"]) == f"<b>{int(answer['score'])}"
        assert [float(token["kl"]) for token in row["tokens"]] == pytest.approx(answer["token_kl"], abs=6e-4)
        assert row["finished"] == (answer["score"] != 3)
    assert "--b) 50%" in tint(0.5, 1.0) and "--a) 100%" in tint(-3.0, 1.0) and tint(0.0, 1.0) == ""


def test_a_reward_model_shows_accuracy_beside_length_and_its_calibration(tmp_path):
    figures = {
        "accuracy": 0.8,
        "pairs": 1000,
        "longer_wins": 0.7,
        "accuracy_similar_length": 0.6,
        "pairs_similar_length": 100,
        "longer_wins_similar_length": 0.55,
        "accuracy_by_grade": {"better": 0.9},
        "length_correlation": 0.25,
        "calibration": [{"predicted": 0.6, "right": 0.5, "pairs": 10}],
        "calibration_error": 0.1,
        "measured_on": "heldout",
    }
    assert [value for _, value in reward_model_rows(figures)] == [
        "80.0%",
        "70.0%",
        "60.0%",
        "55.0%",
        "90.0%",
        "0.25",
        "0.100",
    ]
    rows = [{"step": 1, "loss": 0.7, "accuracy": 0.5}, {"step": 2, "loss": 0.6, "accuracy": 0.75}]
    assert [chart.title for chart in alignment_charts(rows, figures)] == [
        "pairs told apart",
        "calibration on held-out pairs",
    ]
    write_report([run_of(tmp_path / "rm", rows, figures)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "accuracy 80.0%" in page and "nats a token" not in page


def test_training_on_preferences_shows_accuracy_and_margin_of_held_out_pairs(tmp_path):
    names = ("accuracy", "reward_margin", "chosen_logprob")
    rows = [{"step": s, "loss": 0.5, **{name: random.random() for name in names}} for s in range(1, 9)]
    held = {f"heldout_{name}": random.random() for name in names}
    rows.append({"step": 8, "heldout_loss": 0.4, **held})
    charts = alignment_charts(rows, {})
    drawn = {series.name: series.points for chart in charts for series in chart.series}
    assert len(charts) == 3 and all({s.name for s in chart.series} == {"training", "held out"} for chart in charts)
    found = [next(s.points for s in chart.series if s.name == "held out") for chart in charts]
    assert sorted(found) == sorted([(8, value)] for value in held.values()) and drawn["training"]
    write_report([run_of(tmp_path / "dpo", rows, {"step": 8, **held})], tmp_path / "page.html")
    assert f"held-out accuracy {held['heldout_accuracy']:.1%}" in (tmp_path / "page.html").read_text()


def test_runs_that_have_nothing_to_do_with_preferences_show_none_of_it(tmp_path):
    run = run_of(tmp_path / "base", [{"step": 1, "loss": 3.0}], {"heldout_loss": 3.0})
    write_report([run], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert alignment_charts([{"step": 1, "loss": 3.0}], {}) == [] and rollouts_of(run) is None
    assert "the reward model" not in page and "answers of round" not in page and "loss, nats a token" in page
