"""Right, abstained or wrong: phrases, references, and that rewards for them make abstaining best below the threshold."""

from __future__ import annotations

import numpy as np
import pytest

from luban.align.rewards.base import Answer, open_rewards
from luban.align.rewards.verifiers import Facts
from luban.core.errors import ConfigError, DataError
from luban.core.metrics.abstention import abstains, outcome
from luban.evals import scorers
from luban.evals.kinds.base import Example


@pytest.mark.parametrize(
    "text",
    [
        "I don't know.",
        "Sorry, I do not know who that is.",
        "I’m not sure, maybe 1912",
        "I am unsure about that.",
        "I have no idea",
        "Unknown.",
        "no idea",
        "?",
        " ",
        "I really can't say",
        "I cannot recall the year.",
    ],
)
def test_phrases_that_abstain(text):
    assert abstains(text) and outcome(text, ["1912"]) == "abstained"


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "The unknown soldier",
        "You don't know him? Paris.",
        "Is it Paris?",
        "I can say: Paris",
        "I know it: Rome",
    ],
)
def test_phrases_that_answer(text):
    assert not abstains(text)


def test_outcomes_by_the_whole_answer_or_by_what_it_contains():
    assert outcome("The Rhine.", ["rhine"]) == "right" == outcome("It is the Rhine.", ["rhine"], "contains")
    assert outcome("It is the Rhine.", ["rhine"]) == "wrong" == outcome("Elbe", ["rhine"], "contains")
    assert outcome("Rhine, Elbe, Main or Oder", ["rhine"]) == "wrong"  # naming all of them is no knowledge


def scores(name: str, *texts: str, answer: object = "Rhine") -> list[float]:
    rewards = open_rewards([name], (), None, "", "cpu", 1.0)  # type: ignore[arg-type]
    found, apart = rewards.scores([Answer(row={"answer": answer}, text=t, prompt_ids=[], ids=[]) for t in texts])
    assert [*apart] == ["facts"]
    return found.tolist()


def test_rewards_of_the_three_outcomes():
    assert scores("facts", "the Rhine", "I don't know", "Elbe") == [1, 0, -1]
    assert scores("facts:3", "Rhein", "?", "Elbe", answer=["Rhine", "Rhein"]) == [1, 0, -3]
    for penalty in ("0", "-1", "x", "inf", "nan"):
        with pytest.raises(ConfigError, match="number above 0"):
            Facts(penalty)
    for missing in (None, "", 3, []):
        with pytest.raises(DataError, match="needs an `answer`"):
            scores("facts", "x", answer=missing)


def test_the_best_policy_answers_where_it_is_right_more_often_than_the_threshold():
    rng = np.random.default_rng()
    for _ in range(20):
        penalty, options = (
            float(rng.uniform(0.2, 5)),
            rng.dirichlet(np.full(4, 0.5)),
        )  # what a model believes of four answers
        expected = {str(i): p - penalty * (1 - p) for i, p in enumerate(options)} | {"?": 0.0}
        reward = Facts(str(penalty))
        by_reward = {
            said: sum(
                p * reward.scores([Answer(row={"answer": str(i)}, text=said, prompt_ids=[], ids=[])])[0]
                for i, p in enumerate(options)
            )
            for said in expected
        }
        assert by_reward == pytest.approx(expected)
        best = max(by_reward, key=lambda said: by_reward[said])
        assert (best == "?") == (options.max() <= penalty / (1 + penalty))


def test_rates_of_an_evaluation_sum_to_one():
    example = Example(id="0", row={}, question="q", references=("rhine",))
    scorer = scorers.Facts()
    found = scorer.score(["the Rhine", "Elbe", "I don't know", "?"], example)
    assert found == {"right": 0.25, "abstained": 0.5, "wrong": 0.25}
    measures = scorer.measures([{"scores": found}, {"scores": {"right": 1.0, "abstained": 0.0, "wrong": 0.0}}])
    assert {m.name: (m.value, m.better) for m in measures} == {
        "right": (0.625, "higher"),
        "abstained": (0.25, "higher"),
        "wrong": (0.125, "lower"),
    }
    assert scorers.Facts(match="exact").score(["It is the Rhine"], example)["wrong"] == 1
