"""AdamW (Loshchilov & Hutter 2019, algorithm 2), torch's fused kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from luban.optim.family import Optimizer, Stepper, by_role


def check_adam(betas: tuple[float, float], eps: float) -> None:
    """Refuse settings under which Adam is undefined."""
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must lie in [0, 1), {betas} given")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, {eps} given")


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay; matrices decay, vectors (norms, biases) do not."""

    betas: tuple[float, float] = (0.9, 0.95)  # decay of the two moments
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        check_adam(self.betas, self.eps)

    def build(self, parameters: Mapping[str, nn.Parameter]) -> Stepper:
        roles = by_role(parameters)
        groups = [
            {"params": [*roles.hidden.values(), *roles.tables.values()], "weight_decay": self.weight_decay},
            {"params": list(roles.vectors.values()), "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return Stepper([torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)], parameters)

    def state_values(self, shapes: Mapping[str, Sequence[int]]) -> int:
        return sum(2 * math.prod(shape) + 1 for shape in shapes.values())
