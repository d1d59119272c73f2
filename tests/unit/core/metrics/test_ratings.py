"""Ratings, win rates and agreement: known values, planted truths, coverage of intervals."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from luban.core.errors import DataError
from luban.core.metrics.agreement import agreement, cohen_kappa, spearman
from luban.core.metrics.bootstrap import interval
from luban.core.metrics.ratings import Game, bradley_terry, elo_online, expected_score, rate
from luban.core.metrics.win_rate import difficulties, length_controlled, logistic_regression, win_rate

TRUE = {"a": 1250.0, "b": 1100.0, "c": 1000.0, "d": 900.0, "e": 750.0}


def play(rng, count, true=TRUE, ties=0.0):
    games = []
    for _ in range(count):
        first, second = rng.sample(sorted(true), 2)
        won = float(rng.random() < expected_score(true[first], true[second]))
        games.append(Game(first, second, 0.5 if rng.random() < ties else won))
    return games


def test_four_hundred_points_are_odds_of_ten_to_one():
    assert expected_score(1400, 1000) == pytest.approx(10 / 11) and expected_score(1000, 1000) == 0.5
    assert elo_online([Game("a", "b", 1)], k=32) == {"a": 1016.0, "b": 984.0}


def test_twenty_thousand_games_give_ratings_within_fifteen_points_in_any_order():
    rng = random.Random()
    games = play(rng, 20_000)
    found = rate(games, resamples=100)
    assert [each.player for each in found] == list("abcde")
    for each in found:
        assert abs(each.rating - TRUE[each.player]) <= 15
        assert each.interval[0] < each.rating < each.interval[1]
    shuffled = rng.sample(games, len(games))
    assert rate(shuffled, resamples=100) == found
    turned = [Game(g.second, g.first, 1 - g.score) for g in games]
    assert [r.rating for r in rate(turned, resamples=5)] == pytest.approx([r.rating for r in found])
    assert elo_online(shuffled) != elo_online(games)


def test_two_players_ratings_are_the_log_odds_and_ties_are_half_wins():
    ratings = bradley_terry(np.array([[0, 30.0], [10.0, 0]]))
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3), abs=0.01)
    games = [Game("x", "y", s) for s in (1, 1, 0.5, 0.5)]
    assert rate(games, resamples=10)[0].score == 0.75
    assert rate(games, resamples=10)[0].rating - 1000 == pytest.approx(200 * math.log10(3), abs=0.01)


def test_likelihood_is_the_highest_of_all_ratings_nearby():
    rng = random.Random()
    games = play(rng, 300, {"a": 1100, "b": 1000, "c": 900}, ties=0.2)
    found = {each.player: each.rating for each in rate(games, resamples=1)}

    def likelihood(ratings):
        total = 0.0
        for g in games:
            p = expected_score(ratings[g.first], ratings[g.second])
            total += g.score * math.log(p) + (1 - g.score) * math.log(1 - p)
        return total

    best = likelihood(found)
    for name, move in itertools.product("abc", (-5, 5)):
        assert likelihood({**found, name: found[name] + move}) < best


def test_players_that_never_met_cannot_be_compared_and_an_unbeaten_one_has_a_finite_rating():
    with pytest.raises(DataError, match="never met"):
        rate([Game("a", "b", 1), Game("c", "d", 1)])
    with pytest.raises(DataError, match="at least one game"):
        rate([])
    found = rate([Game("a", "b", 1)] * 5, resamples=3)
    assert found[0].player == "a" and math.isfinite(found[0].rating) and found[0].rating > 1400


def test_players_of_few_games_against_one_baseline_are_rated():
    """A published file of pairs: each of many models met the baseline once or twice, and few resamples of all games hold all of them."""
    rng = random.Random()
    games = [Game("base", f"m{i}", float(rng.random() < 0.5)) for i in range(40) for _ in range(2)]
    games += [Game("base", "often", s) for s in (1, 0, 1, 1, 0, 1)]
    found = {each.player: each for each in rate(games, resamples=200)}
    assert found["base"].rating - found["often"].rating == pytest.approx(400 * math.log10(2), abs=0.1)
    for name, each in found.items():
        scores = [1 - g.score for g in games if g.second == name] or [0.5]
        assert (each.interval is None) == (len(set(scores)) == 1 and scores[0] != 0.5), name
        assert each.games == sum(name in (g.first, g.second) for g in games)
    low, high = found["often"].interval
    assert low < found["often"].rating < high


def test_a_player_that_won_everything_moves_no_other_rating():
    rng = random.Random()
    games = play(rng, 400, {"a": 1100, "b": 1000, "c": 900})
    alone = {each.player: each for each in rate(games, resamples=50)}
    found = {each.player: each for each in rate([*games, *[Game("best", "a", 1)] * 3], resamples=50)}
    assert found["best"].interval is None and found["best"].rating > max(each.rating for each in alone.values())
    for name in "abc":
        assert found[name].rating == pytest.approx(alone[name].rating, abs=0.1)
        assert found[name].interval is not None
    assert np.mean([found[name].rating for name in "abc"]) == pytest.approx(1000)


def test_intervals_of_win_rates_cover_the_truth():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        scores = rng.choice([1.0, 0.5, 0.0], 100, p=[0.5, 0.2, 0.3])
        low, high = interval(scores.tolist(), resamples=200)
        hits += low <= 0.6 <= high
    assert abs(hits / 2000 - 0.95) <= 0.015


@pytest.mark.slow
def test_intervals_of_ratings_cover_the_truth():
    true = {"a": 1120.0, "b": 1000.0, "c": 880.0}
    hits = 0
    for seed in range(2000):
        found = rate(play(random.Random(seed), 600, true), resamples=300)
        hits += sum(each.interval[0] <= true[each.player] <= each.interval[1] for each in found)
    assert abs(hits / 6000 - 0.95) <= 0.015


def test_a_planted_preference_for_length_is_removed():
    rng = np.random.default_rng()
    n, own = 3000, 0.3
    theirs = rng.normal(800, 200, n)
    ours = theirs + rng.normal(300, 250, n)
    gaps = ours - theirs
    chance = 1 / (1 + np.exp(-(own + 1.5 * np.tanh(gaps / gaps.std()))))
    scores = (rng.random(n) < chance).astype(float)
    fair = 1 / (1 + math.exp(-own))
    raw, controlled = win_rate(scores), length_controlled(scores, ours, theirs)
    assert raw.value > fair + 0.1 and abs(controlled.value - fair) < 0.06
    assert controlled.interval[0] < controlled.value < controlled.interval[1]
    turned = length_controlled(1 - scores, theirs, ours)
    assert turned.value == pytest.approx(1 - controlled.value, abs=1e-6)
    same = length_controlled(scores, theirs, theirs)
    assert same.value == pytest.approx(raw.value, abs=1e-4)


def test_difficulty_takes_part_where_it_is_known():
    rng = np.random.default_rng()
    hard = rng.normal(0, 2, 1500)
    scores = (rng.random((6, 1500)) < 1 / (1 + np.exp(-hard))).astype(float)
    found = difficulties(scores)
    assert spearman(found.tolist(), hard.tolist()) > 0.8
    rate_ = length_controlled(scores[0], [1.0] * 1500, [1.0] * 1500, found)
    assert abs(rate_.value - scores[0].mean()) < 0.02


def test_the_regression_is_the_likeliest_one():
    rng = np.random.default_rng()
    x, y, counts = rng.normal(size=(300, 3)), rng.random(300).round(1), rng.integers(0, 4, (2, 300)).astype(float)
    weights = logistic_regression(x, y, counts, ridge=0.0)[1]
    gradient = x.T @ (counts[1] * (y - 1 / (1 + np.exp(-x @ weights))))
    assert np.abs(gradient).max() < 1e-6


def test_agreement_beyond_chance():
    # Cohen 1960's way by hand: 20 of 25 and 15 of 25 pairs agree
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert agreement(first, second) == 0.7 and cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(["a"], ["a"]) == 1
    with pytest.raises(ValueError, match="1 and 2 given"):
        agreement(["a"], ["a", "b"])


def test_rank_correlation_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng()
    for _ in range(20):
        a, b = rng.integers(0, 6, 15), rng.integers(0, 6, 15)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(spearman([1, 1], [1, 2]))
