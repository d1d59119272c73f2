"""Chinchilla's form: L(N, D) = E + A/N^α + B/D^β (Hoffmann et al. 2022, section 3.3, equation 2)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

from luban.scaling.observations import FLOPS_PER_TOKEN


@dataclass(frozen=True)
class Optimum:
    """The best model for a budget."""

    flops: float
    parameters: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Chinchilla:
    """Constants of the form."""

    E: float  # loss of an infinite model with infinite data
    A: float
    B: float
    alpha: float
    beta: float

    @property
    def a(self) -> float:
        """Exponent of compute in the best size: N ∝ C^a, D ∝ C^(1−a)."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, D)."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> Optimum:
        """The N and D with the least loss among those with 6·N·D = `flops` (equation 4)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / FLOPS_PER_TOKEN) ** self.a
        tokens = flops / (FLOPS_PER_TOKEN * parameters)
        return Optimum(flops, parameters, tokens, self.loss(parameters, tokens))


class ChinchillaForm:
    """theta = (log E, log A', log B', α, β); A' and B' refer to centred logarithms."""

    starts = tuple(product((-1.0, 0.5), (-1.0,), (-1.0,), (0.2, 0.5), (0.2, 0.5)))

    def log_loss(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Form`."""
        e, a, b, alpha, beta = theta
        terms = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
        total = np.logaddexp.reduce(terms)
        share = np.exp(terms - total)
        return total, np.stack([*share, -share[1] * n, -share[2] * d])

    def constants(self, theta: np.ndarray, mean_n: float, mean_d: float) -> Chinchilla:
        """The constants that theta stands for."""
        e, a, b, alpha, beta = (float(x) for x in theta)
        return Chinchilla(
            float(np.exp(e)), float(np.exp(a + alpha * mean_n)), float(np.exp(b + beta * mean_d)), alpha, beta
        )
