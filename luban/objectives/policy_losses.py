"""Losses of policy gradients, pure functions of log-probabilities; one number a token."""

from __future__ import annotations

import torch
from torch import Tensor


def clipped_policy_loss(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """−min(ρ A, clip(ρ, 1 − low, 1 + high) A) (Schulman et al. 2017, equation 7)."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """½ max((V − R)², (V_old + clip(V − V_old, ±c) − R)²)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """exp(r) − r − 1 with r = log π_ref − log π: never negative (Shao et al. 2024, equation 4)."""
    difference = reference - logprobs
    return torch.expm1(difference) - difference
