"""Losses on preferences, pure functions of log-probabilities, and as variants of a recipe (registry `preference_loss`).

B groups, K answers of the largest group. A log-probability of an answer is summed over its tokens, in nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from luban.core.errors import ConfigError
from luban.core.registry import Registry, Variant


def soft_log_sigmoid_loss(x: Tensor, probability: Tensor) -> Tensor:
    """−p log σ(x) − (1 − p) log σ(−x), whose minimum over x is where σ(x) = p."""
    return -(probability * F.logsigmoid(x) + (1 - probability) * F.logsigmoid(-x))


def dpo_loss(margin: Tensor, beta: float, probability: Tensor) -> Tensor:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7); p < 1: conservative DPO and soft labels.

    Args:
        margin: of the chosen answer over the rejected one, [log π(c) − log π_ref(c)] − [log π(r) − log π_ref(r)].
        probability: p, that the chosen answer is the better one.
    """
    return soft_log_sigmoid_loss(beta * margin, probability)


def ipo_loss(margin: Tensor, beta: float, probability: Tensor) -> Tensor:
    """(margin − 1 / 2β)² (Azar et al. 2024, equation 17), p times that of the label and 1 − p times that of its opposite."""
    target = 1 / (2 * beta)
    return probability * (margin - target).square() + (1 - probability) * (-margin - target).square()


def hinge_loss(margin: Tensor, beta: float, probability: Tensor) -> Tensor:
    """max(0, 1 − β · margin) (Zhao et al. 2023, SLiC, equation 1, on log-ratios), p times that of the label and 1 − p times that
    of its opposite."""
    right, wrong = (1 - beta * margin).clamp_min(0), (1 + beta * margin).clamp_min(0)
    return probability * right + (1 - probability) * wrong


def kto_loss(
    ratio: Tensor, wanted: Tensor, baseline: Tensor, beta: float, desirable: float, undesirable: float
) -> Tensor:
    """λ − v of each answer (Ethayarajh et al. 2024, equation 8), v = λ σ(β (ratio − z₀)) if wanted, else λ σ(β (z₀ − ratio)).

    Args:
        ratio: log π − log π_ref of each answer.
        wanted: bool, the same shape.
        baseline: z₀ ≥ 0, the KL divergence from the reference; a constant.
        desirable, undesirable: λ of wanted and of unwanted answers.
    """
    signed = torch.where(wanted, ratio - baseline, baseline - ratio)
    return torch.where(wanted, desirable, undesirable) * (1 - torch.sigmoid(beta * signed))


def log_odds(mean_logprob: Tensor) -> Tensor:
    """log(P / (1 − P)) of P = exp(mean log-probability a token)."""
    return mean_logprob - torch.log(-torch.expm1(mean_logprob.clamp_max(-1e-7)))


def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, weight: float, probability: Tensor) -> Tensor:
    """−mean log-probability of the chosen answer − λ log σ(log odds ratio) (Hong et al. 2024, equations 6 and 7)."""
    odds = log_odds(chosen_mean) - log_odds(rejected_mean)
    return -chosen_mean + weight * soft_log_sigmoid_loss(odds, probability)


def simpo_loss(chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float, probability: Tensor) -> Tensor:
    """−log σ(β (mean chosen − mean rejected) − γ) (Meng et al. 2024, equation 6)."""
    return soft_log_sigmoid_loss(beta * (chosen_mean - rejected_mean) - gamma, probability)


class AnswerLogprobs(NamedTuple):
    """Of the answers of a batch, the better one of each pair first."""

    policy: Tensor  # (B, K) summed log-probabilities
    reference: Tensor  # (B, K), constants; NaN where they aren't needed
    lengths: Tensor  # (B, K) tokens, 0 where there is no answer
    ranks: Tensor  # (B, K)
    probabilities: Tensor  # (B,)
    mismatched: Tensor  # (B,) log-ratio of another prompt's answer, a constant; NaN where there is none

    @property
    def means(self) -> Tensor:
        """(B, K) log-probabilities a token."""
        return self.policy / self.lengths.clamp_min(1)

    @property
    def ratios(self) -> Tensor:
        """(B, K) log π − log π_ref."""
        return self.policy - self.reference

    @property
    def margins(self) -> Tensor:
        """(B,) of the first answer over the second."""
        return self.ratios[:, 0] - self.ratios[:, 1]


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Variant):
    """Base config of losses on preferences (registry `preference_loss`)."""

    registry: ClassVar[Registry] = Registry(
        "preference_loss",
        {
            "dpo": "luban.objectives.preference_losses:DPO",
            "ipo": "luban.objectives.preference_losses:IPO",
            "hinge": "luban.objectives.preference_losses:Hinge",
            "kto": "luban.objectives.preference_losses:KTO",
            "orpo": "luban.objectives.preference_losses:ORPO",
            "simpo": "luban.objectives.preference_losses:SimPO",
        },
    )
    needs_reference: ClassVar[bool] = True
    soft: ClassVar[bool] = True  # reads the probability that a label is right
    paired: ClassVar[bool] = True  # groups of two answers; else of any number
    mismatches: ClassVar[bool] = False  # each prompt is also read with another prompt's answer

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value < float("inf"):
                raise ConfigError(f"objective.method.{name} must be a number from 0 on, {value} given")

    def __call__(self, answers: AnswerLogprobs) -> Tensor:
        """(B,) loss of each group; of groups without answers it means nothing."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class DPO(PreferenceLoss):
    """Direct preference optimisation; rows with `probability` are soft labels."""

    beta: float = 0.1  # strength of the tie to the reference
    smoothing: float = 0.0  # probability that a label is flipped (conservative DPO, Mitchell 2023)

    def __post_init__(self):
        super().__post_init__()
        if self.smoothing >= 0.5:
            raise ConfigError(f"objective.method.smoothing must be below 0.5, {self.smoothing} given")

    def __call__(self, answers: AnswerLogprobs) -> Tensor:
        p = answers.probabilities * (1 - 2 * self.smoothing) + self.smoothing
        return dpo_loss(answers.margins, self.beta, p)


@dataclass(frozen=True, kw_only=True)
class IPO(PreferenceLoss):
    """Identity preference optimisation, on summed log-probabilities as in the paper."""

    beta: float = 0.1  # τ of the paper

    def __call__(self, answers: AnswerLogprobs) -> Tensor:
        return ipo_loss(answers.margins, self.beta, answers.probabilities)


@dataclass(frozen=True, kw_only=True)
class Hinge(PreferenceLoss):
    """SLiC's hinge on log-ratios."""

    beta: float = 0.1  # one over the margin that is asked for

    def __call__(self, answers: AnswerLogprobs) -> Tensor:
        return hinge_loss(answers.margins, self.beta, answers.probabilities)


@dataclass(frozen=True, kw_only=True)
class KTO(PreferenceLoss):
    """Kahneman–Tversky optimisation: answers one by one, wanted or not; of several answers to a prompt the best are wanted.

    z₀ is estimated on each micro-batch, from prompts with answers to other prompts (section 4.1), so that here alone
    accumulation changes the loss."""

    soft = False
    paired = False
    mismatches = True
    beta: float = 0.1  # strength of the tie to the reference
    desirable: float = 1.0  # λ of wanted answers
    undesirable: float = 1.0  # λ of unwanted answers

    def __call__(self, answers: AnswerLogprobs) -> Tensor:
        present, known = answers.lengths > 0, answers.mismatched.isfinite()
        baseline = (torch.where(known, answers.mismatched, 0.0).sum() / known.sum().clamp_min(1)).clamp_min(0)
        best = answers.ranks.masked_fill(~present, -torch.inf).amax(-1, keepdim=True)
        alone = present.sum(-1, keepdim=True) < 2
        wanted = torch.where(alone, answers.ranks >= 0.5, answers.ranks == best)
        each = kto_loss(answers.ratios, wanted, baseline.detach(), self.beta, self.desirable, self.undesirable)
        return torch.where(present, each, 0.0).sum(-1) / present.sum(-1).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class ORPO(PreferenceLoss):
    """Odds-ratio preference optimisation: no reference; fine-tuning on the chosen answer is part of it."""

    needs_reference = False
    weight: float = 0.1  # λ of the odds ratio

    def __call__(self, answers: AnswerLogprobs) -> Tensor:
        means = answers.means
        return orpo_loss(means[:, 0], means[:, 1], self.weight, answers.probabilities)


@dataclass(frozen=True, kw_only=True)
class SimPO(PreferenceLoss):
    """Simple preference optimisation: mean log-probabilities a token, no reference."""

    needs_reference = False
    beta: float = 2.0  # factor on the difference
    gamma: float = 1.0  # margin that is asked for

    def __call__(self, answers: AnswerLogprobs) -> Tensor:
        means = answers.means
        return simpo_loss(means[:, 0], means[:, 1], self.beta, self.gamma, answers.probabilities)
