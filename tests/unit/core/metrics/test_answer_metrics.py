"""Exact match, F1 and bootstrap intervals, by hand and against the definition."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from luban.core.metrics.answers import answer_tokens, contains_answer, exact_match, f1
from luban.core.metrics.bootstrap import interval


def test_answers_are_compared_without_case_articles_and_punctuation():
    assert exact_match("The Eiffel Tower!", ["eiffel tower"]) == 1
    assert exact_match("Eiffel", ["eiffel tower"]) == 0
    assert exact_match("", []) == 0
    assert exact_match("北京。", ["北京"]) == 1 and exact_match("１２", ["12"]) == 1
    assert f1("in Paris, France", ["Paris"]) == pytest.approx(2 / 4)
    assert f1("首都北京", ["北京"]) == pytest.approx(2 * 2 / 6)
    assert f1("", ["x"]) == 0 and f1("x", []) == 0 and f1("the", ["a"]) == 1


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    rng = random.Random()
    for _ in range(50):
        answer, reference = (rng.choices("bcdefgh", k=rng.randrange(1, 9)) for _ in range(2))
        shared = sum((Counter(answer) & Counter(reference)).values())
        precision, recall = shared / len(answer), shared / len(reference)
        expected = 2 * precision * recall / (precision + recall) if shared else 0
        assert f1(" ".join(answer), [" ".join(reference)]) == pytest.approx(expected)


def test_a_passage_contains_an_answer_as_whole_words():
    assert contains_answer("It was built in 1889, in Paris.", ["1888", "in 1889"])
    assert not contains_answer("the classes", ["class"]) and not contains_answer("anything", ["the"])
    assert contains_answer("中国的首都是北京。", ["首都"])
    assert answer_tokens("Don't stop—now") == ["dont", "stopnow"]


def test_the_interval_is_near_the_normal_one_for_many_scores():
    scores = np.random.default_rng().random(400)
    low, high = interval(scores)
    half = 1.96 * scores.std() / 20
    assert (low, high) == interval(scores)
    assert abs(low - (scores.mean() - half)) < half / 3 and abs(high - (scores.mean() + half)) < half / 3
    assert interval([1.0, 1.0]) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one"):
        interval([])
