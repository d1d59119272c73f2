"""Preference and ranking losses against independent float64 computations and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from luban.core.errors import ConfigError
from luban.objectives.preference_losses import (
    DPO,
    IPO,
    KTO,
    ORPO,
    AnswerLogprobs,
    Hinge,
    SimPO,
    dpo_loss,
    kto_loss,
    log_odds,
)
from luban.objectives.ranking_losses import MARGINS, margins_of, ranking_accuracy, ranking_loss


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def answers() -> AnswerLogprobs:
    rng = np.random.default_rng(np.random.SeedSequence())
    draw = lambda *shape: torch.from_numpy(-rng.gamma(2.0, 5.0, shape))  # noqa: E731
    return AnswerLogprobs(
        policy=draw(5, 2),
        reference=draw(5, 2),
        lengths=torch.from_numpy(rng.integers(3, 20, (5, 2))).double(),
        ranks=torch.tensor([[1.0, 0.0]]).expand(5, 2),
        probabilities=torch.from_numpy(rng.uniform(0.5, 1, 5)),
        mismatched=draw(5),
    )


def by_hand(loss, answers: AnswerLogprobs, row: int) -> float:
    """The loss of one pair in plain floats, written from the papers' equations."""
    (pc, pr), (rc, rr) = answers.policy[row].tolist(), answers.reference[row].tolist()
    (nc, nr), p = answers.lengths[row].tolist(), float(answers.probabilities[row])
    margin = (pc - rc) - (pr - rr)
    if isinstance(loss, DPO):
        q = p * (1 - loss.smoothing) + (1 - p) * loss.smoothing
        return -q * math.log(logistic(loss.beta * margin)) - (1 - q) * math.log(logistic(-loss.beta * margin))
    if isinstance(loss, IPO):
        each = [(m - 1 / (2 * loss.beta)) ** 2 for m in (margin, -margin)]
        return p * each[0] + (1 - p) * each[1]
    if isinstance(loss, Hinge):
        return p * max(0.0, 1 - loss.beta * margin) + (1 - p) * max(0.0, 1 + loss.beta * margin)
    if isinstance(loss, SimPO):
        x = loss.beta * (pc / nc - pr / nr) - loss.gamma
        return -p * math.log(logistic(x)) - (1 - p) * math.log(logistic(-x))
    odds = [math.exp(m) / (1 - math.exp(m)) for m in (pc / nc, pr / nr)]
    x = math.log(odds[0] / odds[1])
    return -pc / nc + loss.weight * (-p * math.log(logistic(x)) - (1 - p) * math.log(logistic(-x)))


@pytest.mark.parametrize("loss", [DPO(beta=0.3), DPO(smoothing=0.2), IPO(beta=0.7), Hinge(beta=0.2), ORPO(), SimPO()])
def test_pair_losses_are_those_of_the_papers(loss, answers):
    found = loss(answers)
    for row in range(5):
        assert float(found[row]) == pytest.approx(by_hand(loss, answers, row), rel=1e-9)


def test_kto_is_that_of_the_paper_and_its_baseline_is_a_constant(answers):
    loss = KTO(beta=0.2, desirable=1.5, undesirable=0.7)
    policy = answers.policy.clone().requires_grad_()
    answers = answers._replace(policy=policy, mismatched=torch.tensor([1.0, 2.0, 0.5, torch.nan, 4.0]))
    baseline = (1.0 + 2.0 + 0.5 + 4.0) / 4
    found = loss(answers)
    for row in range(5):
        wanted, unwanted = (answers.policy[row] - answers.reference[row]).tolist()
        each = [1.5 * (1 - logistic(0.2 * (wanted - baseline))), 0.7 * (1 - logistic(0.2 * (baseline - unwanted)))]
        assert float(found[row].detach()) == pytest.approx(sum(each) / 2, rel=1e-6)
    negative = loss(answers._replace(mismatched=torch.full((5,), -3.0)))
    zero = loss(answers._replace(mismatched=torch.zeros(5)))
    assert torch.equal(negative, zero)  # z₀ is never below 0


def test_kto_takes_answers_one_by_one():
    ratio = torch.tensor([0.3, -0.2], dtype=torch.float64)
    found = kto_loss(ratio, torch.tensor([True, False]), torch.tensor(0.0), 1.0, 1.0, 1.0)
    assert found.tolist() == pytest.approx([1 - logistic(0.3), 1 - logistic(0.2)])


def test_kto_wants_the_best_of_several_answers_whatever_their_scores():
    zeros, nan = torch.zeros(2, 3), torch.full((2,), torch.nan)
    ranks = torch.tensor([[-1.0, -2.0, -5.0], [0.2, 0.1, 0.0]])
    lengths = torch.tensor([[4.0, 4.0, 4.0], [4.0, 4.0, 0.0]])
    answers = AnswerLogprobs(zeros, zeros, lengths, ranks, torch.ones(2), nan)
    found = KTO(desirable=3.0, undesirable=1.0)(answers)  # at equal log-probabilities every answer's loss is λ / 2
    assert found.tolist() == pytest.approx([(3 + 1 + 1) / 2 / 3, (3 + 1) / 2 / 2])


def test_gradient_of_dpo_at_equality_is_half_beta():
    policy = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    dpo_loss(policy[0] - policy[1], 0.4, torch.tensor(1.0)).backward()
    assert policy.grad.tolist() == pytest.approx([-0.2, 0.2])
    assert float(dpo_loss(torch.zeros(()), 0.4, torch.tensor(1.0))) == pytest.approx(math.log(2))


def test_the_minimum_of_a_soft_label_recovers_it():
    margin = torch.linspace(-20, 20, 400001, dtype=torch.float64)
    best = margin[dpo_loss(margin, 0.5, torch.tensor(0.8)).argmin()]
    assert logistic(0.5 * float(best)) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("loss", [DPO(), IPO(), Hinge(), ORPO(), SimPO()])
def test_a_loss_of_a_label_that_says_nothing_prefers_neither_answer(loss, answers):
    """p = ½: exchanging the answers changes nothing (but what ORPO learns of the first one)."""
    unsure = answers._replace(probabilities=torch.full((5,), 0.5, dtype=torch.float64))
    other = unsure._replace(**{n: getattr(unsure, n).flip(1) for n in ("policy", "reference", "lengths")})
    kept = unsure.means[:, 0] - other.means[:, 0] if isinstance(loss, ORPO) else 0.0
    gamma = replace(loss, gamma=0.0) if isinstance(loss, SimPO) else loss
    assert torch.allclose(gamma(unsure) + kept, gamma(other), rtol=1e-12)


def test_log_odds_near_certainty_are_finite():
    assert torch.isfinite(log_odds(torch.tensor([0.0, -1e-9, -1e-3, -50.0]))).all()


@pytest.mark.parametrize("make", [lambda: DPO(beta=-1), lambda: DPO(smoothing=0.5), lambda: KTO(desirable=math.nan)])
def test_settings_without_meaning_are_refused(make):
    with pytest.raises(ConfigError, match=r"objective\.method"):
        make()


def test_a_ranking_of_two_is_the_pairwise_loss_and_of_k_the_mean_over_pairs():
    rng = np.random.default_rng(np.random.SeedSequence())
    scores = torch.from_numpy(rng.normal(size=(3, 5)))
    ranks = torch.from_numpy(rng.permuted(np.tile(np.arange(5.0), (3, 1)), axis=1))
    present = torch.ones(3, 5, dtype=torch.bool)
    present[2, 2:] = False
    margins, probabilities = torch.tensor([0.0, 1.0, 0.0]).double(), torch.tensor([1.0, 1.0, 0.7]).double()
    found = ranking_loss(scores, ranks, present, margins, probabilities)
    for g in range(3):
        each = []
        for i in range(5):
            for j in range(5):
                if present[g, i] and present[g, j] and ranks[g, i] > ranks[g, j]:
                    d, m, p = float(scores[g, i] - scores[g, j]), float(margins[g]), float(probabilities[g])
                    each.append(-p * math.log(logistic(d - m)) - (1 - p) * math.log(logistic(-d - m)))
        assert len(each) == (1 if g == 2 else math.comb(5, 2))
        assert float(found[g]) == pytest.approx(sum(each) / len(each))


def test_accuracy_counts_ties_half_and_absent_answers_not():
    scores = torch.tensor([[2.0, 1.0, 9.0], [1.0, 1.0, 0.0]])
    ranks = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    present = torch.tensor([[True, True, False], [True, True, False]])
    right, count = ranking_accuracy(scores, ranks, present)
    assert (float(right), int(count)) == (1.5, 2)


def test_margins_are_llama_2s():
    grades = torch.tensor([3, -1, 0, 2, 1, 0])
    for name, table in MARGINS.items():
        wanted = [0.0 if grade < 0 else table[grade] for grade in grades.tolist()]
        assert margins_of(grades, name).tolist() == pytest.approx(wanted)
    assert MARGINS["small"] == pytest.approx((1, 2 / 3, 1 / 3, 0)) and MARGINS["large"] == (3, 2, 1, 0)
