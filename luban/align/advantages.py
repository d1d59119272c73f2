"""Advantages and divergences of policy gradients, pure functions in float64.

N answers, T tokens, G prompts with K answers each.
"""

from __future__ import annotations

import numpy as np


def whiten(values: np.ndarray, mask: np.ndarray, *, shift_mean: bool = True) -> np.ndarray:
    """Values (N, T) with variance 1 over the mask, and mean 0, or their own mean where `shift_mean` is false; 0 elsewhere."""
    kept = values[mask]
    if not kept.size:
        return np.zeros_like(values)
    mean = kept.mean()
    scaled = (values - mean) / np.sqrt(kept.var() + 1e-8)
    return np.where(mask, scaled if shift_mean else scaled + mean, 0.0)


def token_rewards(scores: np.ndarray, kl: np.ndarray, mask: np.ndarray, beta: float) -> np.ndarray:
    """(N, T) rewards: −β KL at every token, and the answer's score at its last (Ouyang et al. 2022, section 3.5).

    Args:
        scores: (N,) of the answers.
        kl: (N, T) log π − log π_ref of the sampled tokens.
        mask: (N, T) true at the answers' tokens.
    """
    rewards = np.where(mask, -beta * kl, 0.0)
    rows = np.flatnonzero(mask.any(-1))
    last = mask.shape[1] - 1 - mask[:, ::-1].argmax(-1)
    rewards[rows, last[rows]] += scores[rows]
    return rewards


def gae(
    rewards: np.ndarray, values: np.ndarray, mask: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """(advantages, returns), (N, T) each, by generalised advantage estimation (Schulman et al. 2016, equation 16).

    δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γ λ A_{t+1}; behind an answer's last token V and A are 0. returns = A + V; with λ = 1
    A is the discounted sum of rewards less V.
    """
    advantages = np.zeros_like(rewards)
    following_value, following = np.zeros(len(rewards)), np.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        advantages[:, t] = np.where(inside, delta + gamma * lam * following, 0.0)
        following_value = np.where(inside, values[:, t], following_value)
        following = np.where(inside, advantages[:, t], following)
    return advantages, np.where(mask, advantages + values, 0.0)


def leave_one_out(scores_GK: np.ndarray) -> np.ndarray:
    """(G, K) scores less the mean of the prompt's other answers (RLOO; Kool et al. 2019; Ahmadian et al. 2024)."""
    others = scores_GK.shape[1] - 1
    if others < 1:
        raise ValueError("leave-one-out needs at least two answers to a prompt")
    return scores_GK - (scores_GK.sum(1, keepdims=True) - scores_GK) / others


def group_relative(scores_GK: np.ndarray, *, scale: bool = True) -> np.ndarray:
    """(G, K) scores less the prompt's mean, divided by its standard deviation (GRPO; Shao et al. 2024, section 4.1.2) unless
    `scale` is false (Dr. GRPO; Liu et al. 2025). A group whose scores are all equal has advantage 0."""
    centred = scores_GK - scores_GK.mean(1, keepdims=True)
    return centred / (scores_GK.std(1, ddof=1, keepdims=True) + 1e-6) if scale else centred


def kl_estimates(ratio: np.ndarray) -> dict[str, np.ndarray]:
    """Estimators of KL(π‖π_ref) from log π − log π_ref of tokens sampled from π (Schulman 2020): k1 is unbiased, k2 and k3
    are never negative, k3 is unbiased too."""
    return {"k1": ratio, "k2": ratio**2 / 2, "k3": np.expm1(-ratio) + ratio}


def adapted_coefficient(beta: float, kl: float, *, target: float, horizon: float, answers: int) -> float:
    """The next KL coefficient: β (1 + clip(KL / target − 1, ±0.2) · n / horizon) (Ziegler et al. 2019, section 2.2).

    Args:
        kl: mean over answers of the KL summed over tokens, in nats.
        answers: n, of the round.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * answers / horizon)


def importance_weights(trainer: np.ndarray, sampler: np.ndarray, most: float) -> np.ndarray:
    """min(π_trainer / π_sampler, most), from log-probabilities: truncated importance sampling."""
    return np.minimum(np.exp(np.minimum(trainer - sampler, 50.0)), most)
