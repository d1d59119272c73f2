"""Judges: both orders, what can't be read, planted preferences, files, the leaderboard page."""

from __future__ import annotations

import json
import random
import re

import pytest
from evals_shared import Scripted, read_json, read_lines, write_task

import luban
from luban.cli.main import main
from luban.core.errors import DataError, UnfinishedError, UsageError
from luban.evals.backends.local import LocalBackend
from luban.evals.judges.base import Pair, Single
from luban.evals.judges.model import JudgeTemplate, ModelJudge, load_template
from luban.evals.judges.pairs import Match, match_files, read_pairs
from luban.evals.judges.pairwise import judge_matches, run_judge
from luban.evals.judges.rules import RuleJudge
from luban.evals.requests import Failed, Score, Scored


def judge_of(say, **template):
    plain = {"pair": "{{first}}|{{second}}", "single": "{{answer}}", **template}
    return ModelJudge(Scripted(say), JudgeTemplate(**plain))


def asked(request):
    return request.prompt[-1]["content"]


def matches(count=40, models=("a", "b"), rng=random):
    return [
        Match(
            id=str(i),
            prompt=f"p{i}",
            first=models[0],
            second=models[1],
            answers=("x" * rng.randint(1, 9), "y" * rng.randint(1, 9)),
        )
        for i in range(count)
    ]


def test_an_always_first_judge_gives_ties_only():
    for judge in (RuleJudge("first"), judge_of(lambda request: "[[A]]")):
        outcomes = judge_matches(judge, matches())
        assert all(each.verdict == "tie" and not each.consistent for each in outcomes)


def test_a_judge_without_a_bias_keeps_its_verdict_in_both_orders():
    for judge in (
        RuleJudge("longest"),
        judge_of(lambda r: "[[A]]" if len(asked(r).split("|")[0]) > len(asked(r).split("|")[1]) else "[[B]]"),
    ):
        for each in judge_matches(judge, [m for m in matches() if len(m.answers[0]) != len(m.answers[1])]):
            assert each.consistent and each.verdict == (
                "first" if len(each.match.answers[0]) > len(each.match.answers[1]) else "second"
            )


def test_what_cannot_be_read_is_counted_apart_and_never_scored(tmp_path):
    said = {"p": "[[A]] or rather [[C]]", "q": "I like both.", "r": "[[a]]"}
    some = [Match(id=name, prompt=name, first="a", second="b", answers=(f"{name}1", f"{name}2")) for name in said]
    judge = judge_of(lambda r: said[asked(r)[0]])
    found = run_judge(judge, some, tmp_path / "out")
    assert found["unparsed"] == {"value": 2, "interval": None, "n": 3} and found["win_rate"]["n"] == 1
    rows = read_lines(tmp_path / "out" / "judgements.jsonl")
    assert [row["verdict"] for row in rows] == ["tie", None, None] and rows[1]["orders"][0]["text"] == "I like both."
    with pytest.raises(DataError, match="none of 3 judgements of scripted could be read"):
        run_judge(judge_of(lambda r: "hm"), some, tmp_path / "none")


def test_a_judge_that_does_not_answer_is_asked_again_by_the_next_run(tmp_path):
    down = judge_of(lambda r: Failed(error="status 503") if "3" in asked(r) else "[[A]]")
    some = [Match(id=str(i), prompt="p", first="a", second="b", answers=(f"{i}x", f"{i}y")) for i in range(5)]
    with pytest.raises(UnfinishedError, match="1 of 5 matches have no judgement"):
        run_judge(down, some, tmp_path / "out")
    up = judge_of(lambda r: "[[C]]")
    found = run_judge(up, some, tmp_path / "out")
    assert len(up.backend.backend.asked) == 2 and found["ties"]["n"] == 5


def test_a_small_model_is_asked_by_likelihood(tiny_checkpoint):
    template = load_template("likelihood")
    judge = ModelJudge(LocalBackend(luban.load_model(tiny_checkpoint)), template)
    pair = Pair(prompt="Say hi", first="hi", second="no")
    one, other = judge.compare([pair, pair.swapped()])
    assert one.verdict and other.verdict and re.fullmatch(r"A [\d.]+, B [\d.]+", one.text)
    assert 1 <= judge.grade([Single(prompt="Say hi", answer="hi")])[0].grade <= 9

    def likely(request):
        assert isinstance(request, Score)
        return Scored(
            logprob=-1.0
            if request.continuation == ("A" if "good" in asked_context(request).split("|")[0] else "B")
            else -3.0,
            greedy=True,
            tokens=1,
        )

    def asked_context(request):
        return request.context[-1]["content"]

    planted = judge_of(likely, method="likelihood")
    assert [
        planted.compare([p])[0].verdict
        for p in (Pair(prompt="p", first="good", second="bad"), Pair(prompt="p", first="bad", second="good"))
    ] == ["first", "second"]


def test_a_liking_for_one_letter_cancels_out_where_log_odds_are_averaged():
    def say(request):
        prompt = request.context[-1]["content"]
        good_first = len(prompt.split("|")[0]) > len(prompt.split("|")[1])
        liked = 2.0 if request.continuation == "A" else 0.3 * (1 if good_first else 2)
        return Scored(logprob=liked - 5, greedy=True, tokens=1)

    some = [m for m in matches() if len(m.answers[0]) != len(m.answers[1])]
    assert all(each.verdict == "tie" for each in judge_matches(judge_of(say, method="likelihood"), some))
    for each in judge_matches(judge_of(say, method="calibrated"), some):
        assert each.verdict == ("first" if len(each.match.answers[0]) > len(each.match.answers[1]) else "second")
    assert load_template("calibrated").method == "calibrated" and load_template("calibrated").pair


def test_grades_are_read_or_missing():
    judge = judge_of(lambda r: asked(r))
    grades = judge.grade(
        [Single(prompt="p", answer=text) for text in ("so [[7.5]]", "[[11]]", "seven", "[[3]] no [[4]]")]
    )
    assert [each.grade for each in grades] == [7.5, None, None, 4.0]


def test_letters_may_be_reversed():
    judge = judge_of(lambda r: "[[A]]", reversed_letters=True)
    assert judge.compare([Pair(prompt="p", first="1", second="2")])[0].verdict == "second"


def test_answers_are_graded_in_an_evaluation(tiny_checkpoint, tmp_path):
    from luban.evals.run import EvalOptions, evaluate

    spec = {"prompt": "{{q}}", "kind": {"type": "judge", "max_tokens": 4}}
    task = write_task(tmp_path, "talk", spec, [{"q": "a"}, {"q": "b"}, {"q": "c"}])
    grades = iter(["[[4]]", "no idea", "[[8]]"])
    found = evaluate(str(tiny_checkpoint), [task], tmp_path / "out", EvalOptions(), judge_of(lambda r: next(grades)))
    assert found.results["grade"]["value"] == 6 and found.results["grade"]["n"] == 2 and found.counts["unparsed"] == 1
    with pytest.raises(UsageError, match="give --judge"):
        evaluate(str(tiny_checkpoint), [task], tmp_path / "other", EvalOptions())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_of(path, quality, rng, prompts=60):
    rows = [
        {"prompt": f"q{i}", "answer": f"{i} " + "x" * max(1, round(quality + rng.gauss(0, 3)))} for i in range(prompts)
    ]
    return write_lines(path, rows)


def test_files_of_answers_become_a_leaderboard(tmp_path, capsys):
    rng = random.Random(2)
    files = [
        str(answers_of(tmp_path / f"{name}.jsonl", quality, rng))
        for name, quality in (("weak", 5), ("strong", 12), ("fair", 9))
    ]
    humans = write_lines(tmp_path / "h.jsonl", [{"prompt": f"q{i}", "preference": 2} for i in range(10)])
    out = tmp_path / "out"
    assert (
        main(["judge", *files, "--judge", "rule:longest", "--humans", str(humans), "--repeat", "--out", str(out)]) == 0
    )
    results = read_json(out / "results.json")
    ratings = {name: results[f"rating/{name}"] for name in ("weak", "strong", "fair")}
    assert (
        ratings["strong"]["value"] > ratings["fair"]["value"] > ratings["weak"]["value"] and ratings["fair"]["n"] == 120
    )
    assert results["win_rate/weak against strong"]["value"] < 0.3 and results["human_agreement"]["n"] == 10
    assert results["self_agreement"]["value"] == 1 and results["longer_preferred"]["value"] == 1
    page = (out / "leaderboard.html").read_text()
    assert page.index("<td>strong</td>") < page.index("<td>fair</td>") < page.index("<td>weak</td>")
    assert not re.findall(r'(?:src|href)="|url\(|https?://', page)
    assert "rating/strong" in capsys.readouterr().out


def test_answers_of_evaluations_of_several_tasks_are_compared_item_by_item(tmp_path):
    def answers(name, length):
        rows = [{"task": t, "item": str(i), "prompt": f"{t}{i}", "answer": t * length} for t in "ab" for i in range(3)]
        return write_lines(tmp_path / f"{name}.jsonl", rows)

    one, other = answers("one", 3), answers("other", 5)
    humans = write_lines(tmp_path / "h.jsonl", [{"id": "b/1", "preference": 1}])
    found = match_files([one, other], humans=humans)
    assert [match.id for match in found] == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    assert [match.prompt for match in found if match.human == "first"] == ["b1"]
    alone = write_lines(tmp_path / "alone.jsonl", [row for row in read_lines(other) if row["task"] == "b"])
    assert [match.prompt for match in match_files([one, alone])] == ["b0", "b1", "b2"]
    assert [match.id for match in match_files([alone, alone])] == ["0", "1", "2"]
    assert main(["judge", str(one), "--judge", "rule", "--out", str(tmp_path / "graded")]) == 0
    assert read_json(tmp_path / "graded" / "results.json")["grade"]["n"] == 6


def test_a_published_file_of_many_models_becomes_a_leaderboard(tmp_path, capsys):
    """Each model met the baseline once or twice; most of them won everything."""
    rows = [
        {
            "instruction": f"i{i}",
            "output_1": "a",
            "output_2": "b",
            "generator_2": f"m{i // 2}",
            "preferred": 2 - (i < 3),
        }
        for i in range(30)
    ]
    rows.append({**rows[0], "instruction": "again", "preferred": 2})
    file, out = write_lines(tmp_path / "pairs.jsonl", rows), tmp_path / "out"
    assert main(["judge", str(file), "--judge", "human", "--out", str(out)]) == 0
    results = read_json(out / "results.json")
    assert results["rating/m0"]["interval"] and results["rating/m5"]["interval"] is None
    assert results["rating/m5"]["value"] > results["rating/output_1"]["value"] > results["rating/m0"]["value"]
    assert "and 10 more won or lost all" in capsys.readouterr().err
    page = (out / "leaderboard.html").read_text()
    assert page.count("none: won or lost all") == 13 and page.count('class="range"') == 3


def test_single_answers_are_graded(tmp_path, capsys):
    file = write_lines(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "answer": "x" * i} for i in range(1, 5)])
    assert main(["judge", str(file), "--judge", "rule", "--out", str(tmp_path / "out")]) == 0
    results = read_json(tmp_path / "out" / "results.json")
    assert results["grade"]["value"] == 2.5 and results["grade"]["n"] == 4 and results["unparsed"]["value"] == 0
    assert [row["grade"] for row in read_lines(tmp_path / "out" / "judgements.jsonl")] == [1, 2, 3, 4]
    from luban.evals.judges.grades import run_grades

    down = judge_of(lambda r: Failed(error="down") if asked(r) == "xxx" else "hm" if asked(r) == "xx" else "[[6]]")
    with pytest.raises(UnfinishedError, match="1 of 4 answers have no grade"):
        run_grades(down, file, tmp_path / "again")
    found = run_grades(judge_of(lambda r: "[[2]]"), file, tmp_path / "again")
    assert found["grade"]["n"] == 3 and found["unparsed"]["value"] == 1
    assert found["grade"]["value"] == pytest.approx((6 + 2 + 6) / 3)


def test_pairs_with_people_s_preferences(tmp_path):
    rows = [
        {"instruction": f"i{i}", "output_1": "a", "output_2": "bb", "generator_2": "m", "preferred": 1 + i % 2}
        for i in range(6)
    ]
    file = write_lines(tmp_path / "pairs.jsonl", [*rows, {"prompt": "p", "chosen": "x", "rejected": "yy"}])
    found = read_pairs(file)
    assert [m.human for m in found[:2]] == ["first", "second"] and found[0].second == "m" and found[-1].human == "first"
    assert main(["judge", str(file), "--judge", "human", "--limit", "6", "--out", str(tmp_path / "out")]) == 0
    results = read_json(tmp_path / "out" / "results.json")
    assert results["win_rate"]["value"] == 0.5 and results["human_kappa"]["value"] == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "p"}], "a.jsonl:1: a row needs a prompt"),
        ([{"prompt": "p", "answer": "a"}] * 2, "a.jsonl:2: there is an answer to 'p' already"),
        ([], "holds no answer"),
        ([{"prompt": "other", "answer": "a"}], "have no prompt in common"),
    ],
)
def test_files_that_are_not_right_are_refused(tmp_path, rows, said):
    other = write_lines(tmp_path / "b.jsonl", [{"prompt": "p", "answer": "b"}])
    with pytest.raises(DataError, match=said):
        match_files([write_lines(tmp_path / "a.jsonl", rows), other])


def test_errors_at_the_command_line_are_one_line(tmp_path, capsys):
    file = str(
        write_lines(tmp_path / "pairs.jsonl", [{"instruction": "i", "output_1": "a", "output_2": "b", "preferred": 3}])
    )
    for arguments, said, code in (
        ([file, "--judge", "rule:longest"], "pairs.jsonl:1: a preference is 1, 2, or 0", 1),
        ([file, "--judge", "rule:long"], "1: a preference", 1),
        ([file, file, "--judge", ""], "needs a prompt", 1),
        ([str(tmp_path / "none.jsonl"), "--judge", "rule"], "is not a file", 1),
        (["--judge", "rule:first"], "takes two files", 2),
    ):
        assert main(["judge", *arguments, "--out", str(tmp_path / "out")]) == code
        printed = capsys.readouterr().err
        assert said in printed and len(printed.strip().splitlines()) == 1
