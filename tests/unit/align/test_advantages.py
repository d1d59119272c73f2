"""Advantages, divergences and controllers against closed forms and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luban.align.advantages import (
    adapted_coefficient,
    gae,
    group_relative,
    importance_weights,
    kl_estimates,
    leave_one_out,
    token_rewards,
    whiten,
)
from luban.objectives.policy_losses import clipped_policy_loss, clipped_value_loss, k3


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence())


def answers(rng, rows=4, tokens=12) -> np.ndarray:
    """Masks of one stretch a row."""
    mask = np.zeros((rows, tokens), dtype=bool)
    for row in mask:
        start, stop = np.sort(rng.choice(tokens + 1, 2, replace=False))
        row[start:stop] = True
    return mask


def test_gae_with_lambda_1_is_returns_less_values_and_with_0_the_td_error(rng):
    mask = answers(rng)
    rewards, values = rng.normal(size=(2, *mask.shape))
    gamma = 0.9
    one, returns = gae(rewards, values, mask, gamma, 1.0)
    zero, _ = gae(rewards, values, mask, gamma, 0.0)
    for row in range(len(mask)):
        at = np.flatnonzero(mask[row])
        for i, t in enumerate(at):
            discounted = sum(gamma**k * rewards[row, s] for k, s in enumerate(at[i:]))
            following = values[row, at[i + 1]] if i + 1 < len(at) else 0.0
            assert returns[row, t] == pytest.approx(discounted)
            assert one[row, t] == pytest.approx(discounted - values[row, t])
            assert zero[row, t] == pytest.approx(rewards[row, t] + gamma * following - values[row, t])
    assert not one[~mask].any() and not returns[~mask].any()


def test_gae_between_is_the_weighted_sum_of_td_errors(rng):
    mask = answers(rng, rows=1)
    rewards, values = rng.normal(size=(2, *mask.shape))
    found, _ = gae(rewards, values, mask, 0.97, 0.8)
    deltas, at = gae(rewards, values, mask, 0.97, 0.0)[0][0], np.flatnonzero(mask[0])
    for i, t in enumerate(at):
        assert found[0, t] == pytest.approx(sum((0.97 * 0.8) ** k * deltas[s] for k, s in enumerate(at[i:])))


def test_whitening_is_over_the_mask_alone(rng):
    mask, values = answers(rng), rng.normal(3, 5, size=(4, 12))
    values[~mask] = 1e6
    found = whiten(values, mask)
    assert found[mask].mean() == pytest.approx(0, abs=1e-9)
    assert mask.sum() < 2 or found[mask].std() == pytest.approx(1, abs=1e-5)
    kept = whiten(values, mask, shift_mean=False)
    assert kept[mask].mean() == pytest.approx(values[mask].mean()) and not kept[~mask].any()
    assert not whiten(values, np.zeros_like(mask)).any()


def test_the_score_stands_at_the_last_token_and_the_penalty_at_all(rng):
    mask, kl, scores = answers(rng), rng.normal(size=(4, 12)), rng.normal(size=4)
    found = token_rewards(scores, kl, mask, 0.1)
    assert found.sum(-1) == pytest.approx(scores - 0.1 * np.where(mask, kl, 0).sum(-1))
    for row in range(4):
        last = np.flatnonzero(mask[row])[-1]
        assert found[row, last] == pytest.approx(scores[row] - 0.1 * kl[row, last])


def test_group_baselines(rng):
    scores = rng.normal(size=(3, 4))
    left = leave_one_out(scores)
    relative, centred = group_relative(scores), group_relative(scores, scale=False)
    for g in range(3):
        for k in range(4):
            others = [scores[g, j] for j in range(4) if j != k]
            assert left[g, k] == pytest.approx(scores[g, k] - np.mean(others))
            assert relative[g, k] == pytest.approx(centred[g, k] / np.std(scores[g], ddof=1), rel=1e-4)
    assert left == pytest.approx(centred * 4 / 3)
    assert not group_relative(np.ones((2, 4))).any()
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(np.ones((2, 1)))


def test_estimators_of_the_divergence(rng):
    policy, reference = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    exact = float((np.exp(policy) * (policy - reference)).sum())
    found = kl_estimates(policy - reference)
    assert float((np.exp(policy) * found["k1"]).sum()) == pytest.approx(exact)
    assert float((np.exp(policy) * found["k3"]).sum()) == pytest.approx(exact)
    assert (found["k2"] >= 0).all() and (found["k3"] >= 0).all()
    assert k3(torch.from_numpy(policy), torch.from_numpy(reference)).numpy() == pytest.approx(found["k3"])


def test_the_controller_holds_its_target():
    beta, kl = 0.2, 0.0
    held = []
    for _ in range(4000):
        kl = 2.0 / beta  # a policy whose divergence is inversely proportional to the coefficient
        held.append(kl)
        beta = adapted_coefficient(beta, kl, target=6.0, horizon=10000, answers=256)
    assert all(abs(each - 6) <= 1 for each in held[-1000:])
    assert adapted_coefficient(1.0, 600.0, target=6.0, horizon=100, answers=10) == pytest.approx(1.02)
    assert adapted_coefficient(1.0, 0.0, target=6.0, horizon=100, answers=10) == pytest.approx(0.98)


def test_importance_weights_are_truncated_above_only():
    trainer, sampler = np.log([0.5, 0.1, 0.9]), np.log([0.25, 0.2, 0.1])
    assert importance_weights(trainer, sampler, 3.0) == pytest.approx([2.0, 0.5, 3.0])


def test_clipped_losses(rng):
    ratio = torch.from_numpy(rng.uniform(0.3, 2, 50))
    advantages = torch.from_numpy(rng.normal(size=50))
    found = clipped_policy_loss(ratio, advantages, 0.2, 0.3)
    for r, a, loss in zip(ratio.tolist(), advantages.tolist(), found.tolist(), strict=True):
        assert loss == pytest.approx(-min(r * a, min(max(r, 0.8), 1.3) * a))
    values, old, returns = (torch.from_numpy(rng.normal(size=50)) for _ in range(3))
    found = clipped_value_loss(values, old, returns, 0.2)
    for v, o, g, loss in zip(values.tolist(), old.tolist(), returns.tolist(), found.tolist(), strict=True):
        clipped = o + min(max(v - o, -0.2), 0.2)
        assert loss == pytest.approx(max((v - g) ** 2, (clipped - g) ** 2) / 2)
