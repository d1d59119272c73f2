"""Gao's forms: planted coefficients come back, the estimator is unbiased, and noisier proxies peak earlier."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from luban.align.best_of import best_of_n_kl, expected_best
from luban.align.overoptimisation import best_of_n_curve, fit_overoptimisation, optimal_policy_curve
from luban.cli.main import main
from luban.core.errors import DataError

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def test_planted_coefficients_and_peaks_come_back():
    kl = np.linspace(0.2, 30, 40)
    d = np.sqrt(kl)
    found = fit_overoptimisation("best_of_n", kl, d * (0.9 - 0.1 * d))
    assert (
        found.alpha == pytest.approx(0.9) and found.beta == pytest.approx(0.1) and found.r_squared == pytest.approx(1)
    )
    assert found.peak == pytest.approx(4.5)
    found = fit_overoptimisation("reinforcement", kl, d * (0.9 - 0.4 * np.log(d)))
    assert found.peak == pytest.approx(math.exp(0.9 / 0.4 - 1)) and found.reward(2.0) == pytest.approx(
        2 * (0.9 - 0.4 * math.log(2))
    )
    at = np.linspace(0.5, 6, 200)
    assert abs(at[np.argmax([found.reward(x) for x in at])] - found.peak) < 0.05
    assert (
        fit_overoptimisation("best_of_n", kl, d).peak == math.inf or fit_overoptimisation("best_of_n", kl, d).peak > 1e6
    )
    with pytest.raises(DataError, match="at least three points"):
        fit_overoptimisation("reinforcement", [0.01, 0.02, 1.0], [0, 0, 1])


def test_a_peak_behind_the_points_is_none():
    d = np.linspace(0.5, 4.0, 9)
    inside = fit_overoptimisation("best_of_n", d**2, d * (1.2 - 0.2 * d))  # highest at 3
    outside = fit_overoptimisation("best_of_n", d**2, d * (1.2 - 0.1 * d))  # at 6
    assert inside.peak_words == "peak at √KL = 3.00"
    assert outside.peak == pytest.approx(6) and outside.peak_words == "no peak up to √KL = 4.00, the farthest point"


def test_the_estimate_is_the_mean_over_all_subsets():
    rng = np.random.default_rng()
    proxy, gold = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    for n in (1, 2, 5, 7):
        means = [
            np.mean([gold[p, max(subset, key=lambda i: proxy[p, i])] for subset in itertools.combinations(range(7), n)])
            for p in range(3)
        ]
        assert best_of_n_curve(proxy, gold, [n])[0] == pytest.approx(np.mean(means))
    assert best_of_n_curve(proxy, proxy, [3])[0] == pytest.approx(
        np.mean([expected_best(row, 3) for row in proxy.tolist()])
    )
    with pytest.raises(DataError, match="best of 8"):
        best_of_n_curve(proxy, gold, [8])


def bandit(rng, noise, prompts=120, arms=1024):
    """Answers whose gold reward has a heavy lower tail where the proxy errs upwards: what is exploited is bad."""
    gold = rng.normal(size=(prompts, arms))
    error = noise * rng.exponential(size=(prompts, arms))
    return gold + error, gold - 0.5 * error * error * noise


def test_gold_reward_of_a_noisy_proxy_rises_and_falls_by_the_form_and_peaks_earlier_the_noisier():
    rng = np.random.default_rng(5)
    kl = [best_of_n_kl(n) for n in SIZES]
    assert kl[4] == pytest.approx(math.log(16) - 15 / 16)
    peaks, peaks_rl = [], []
    for noise in (0.4, 0.6, 0.9):
        proxy, gold = bandit(rng, noise)
        curve = best_of_n_curve(proxy, gold, SIZES)
        found = fit_overoptimisation("best_of_n", kl, curve - curve[0])
        assert found.r_squared >= 0.95, noise
        peaks.append(found.peak)
        policies = optimal_policy_curve(proxy, gold, np.geomspace(0.05, 8, 25))
        kept = policies[0] < 4.5  # 1024 answers hold no policy farther than ln 1024
        fitted = fit_overoptimisation("reinforcement", policies[0][kept], (policies[2] - gold.mean())[kept])
        assert fitted.r_squared >= 0.95, noise
        peaks_rl.append(fitted.peak)
    assert peaks == sorted(peaks, reverse=True) and peaks_rl == sorted(peaks_rl, reverse=True)


def test_reweighted_policies_move_from_the_initial_one_to_the_best_answer():
    rng = np.random.default_rng()
    proxy, gold = bandit(rng, 0.3, prompts=5, arms=50)
    kl, of_proxy, of_gold = optimal_policy_curve(proxy, gold, [0.0, 1.0, 1e4])
    assert (
        kl[0] == pytest.approx(0) and kl[2] == pytest.approx(math.log(50)) and of_proxy[0] < of_proxy[1] < of_proxy[2]
    )
    assert of_proxy[2] == pytest.approx(proxy.max(1).mean()) and of_gold[0] == pytest.approx(gold.mean())


def test_a_file_of_rewards_becomes_a_page_and_what_is_not_right_is_refused(tmp_path, capsys):
    proxy, gold = bandit(np.random.default_rng(2), 0.6, prompts=20, arms=64)
    rows = [
        {"prompt": str(p), "proxy": float(proxy[p, a]), "gold": float(gold[p, a])} for p in range(20) for a in range(64)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "overoptimisation", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "p.html")]) == 0
    assert capsys.readouterr().out.count("R²") == 2 and (tmp_path / "p.html").read_text().count("<svg") == 2
    for text, said in (
        ('{"prompt": "a", "proxy": 1}\n', "r.jsonl:1: a row needs"),
        ('{"prompt": "a", "proxy": 1, "gold": 2}\n', "at least two answers"),
    ):
        (tmp_path / "r.jsonl").write_text(text)
        assert main(["data", "overoptimisation", str(tmp_path / "r.jsonl"), "--out", str(tmp_path / "p.html")]) == 1
        assert said in capsys.readouterr().err
