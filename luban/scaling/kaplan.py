"""Kaplan's form: L(N, D) = ((Nc/N)^(αN/αD) + Dc/D)^αD (Kaplan et al. 2020, equation 1.5); no irreducible loss."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np


@dataclass(frozen=True)
class Kaplan:
    """Constants of the form. Its limits are (Nc/N)^αN with enough data and (Dc/D)^αD with enough parameters."""

    Nc: float
    Dc: float
    alpha_n: float
    alpha_d: float

    def loss(self, parameters: float, tokens: float) -> float:
        """L(N, D)."""
        return ((self.Nc / parameters) ** (self.alpha_n / self.alpha_d) + self.Dc / tokens) ** self.alpha_d


# Kaplan et al. 2020, figure 1: each alone; the joint fit of its table 2 differs a little
PUBLISHED = Kaplan(Nc=8.8e13, Dc=5.4e13, alpha_n=0.076, alpha_d=0.095)


class KaplanForm:
    """theta = (r·log Nc', r, log Dc', αD), r = αN/αD; Nc' and Dc' refer to centred logarithms."""

    starts = tuple(product((5.0, 15.0), (0.5, 1.0), (5.0, 15.0), (0.05, 0.2)))

    def log_loss(self, theta: np.ndarray, n: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Form`."""
        a, ratio, b, alpha = theta
        terms = np.stack([a - ratio * n, b - d])
        total = np.logaddexp.reduce(terms)
        share = np.exp(terms - total)
        return alpha * total, np.stack([alpha * share[0], -alpha * share[0] * n, alpha * share[1], total])

    def constants(self, theta: np.ndarray, mean_n: float, mean_d: float) -> Kaplan:
        """The constants that theta stands for."""
        a, ratio, b, alpha = (float(x) for x in theta)
        return Kaplan(float(np.exp(a / ratio + mean_n)), float(np.exp(b + mean_d)), alpha * ratio, alpha)
