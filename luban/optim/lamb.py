"""LAMB: Adam's direction, tensor by tensor as long as the weights (You et al. 2020, algorithm 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luban.optim.adamw import check_adam
from luban.optim.base import Roles, Shapes
from luban.optim.tensorwise import State, Tensorwise, TensorwiseConfig


class LambGroups(Tensorwise):
    """The update."""

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        """Both moments 0."""
        return {
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
            "step": torch.zeros((), device=weight.device),
        }

    def advance(
        self, weight: Tensor, gradient: Tensor, state: State, lr: float, group: dict[str, Any]
    ) -> tuple[Tensor, State]:
        """r = m̂ / (√v̂ + ε) + λw; w ← w − lr·(‖w‖ / ‖r‖)·r, the ratio 1 where either length is 0."""
        beta1, beta2 = group["betas"]
        first = torch.lerp(gradient, state["exp_avg"], beta1)
        second = torch.lerp(gradient.square(), state["exp_avg_sq"], beta2)
        step = state["step"] + 1
        left1, left2 = ((1 - beta ** step.double()).to(weight.dtype) for beta in group["betas"])
        corrected = (first / left1) / ((second / left2).sqrt() + group["eps"])
        direction = corrected + group["decay"] * weight
        lengths = weight.norm(), direction.norm()
        ratio = torch.where((lengths[0] > 0) & (lengths[1] > 0), lengths[0] / lengths[1].clamp_min(1e-38), 1.0)
        return weight - lr * ratio * direction, {"exp_avg": first, "exp_avg_sq": second, "step": step}


@dataclass(frozen=True, kw_only=True)
class Lamb(TensorwiseConfig):
    """For large batches: a step changes every tensor by the same share of its length."""

    algorithm = LambGroups
    lr: float = 5e-3  # peak learning rate, as a share of each tensor's length
    betas: tuple[float, float] = (0.9, 0.999)  # decay of the two moments
    eps: float = 1e-6  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        check_adam(self.betas, self.eps)

    def settings(self) -> dict[str, Any]:
        """Betas and eps."""
        return {"betas": self.betas, "eps": self.eps}

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        """Two moments and a count."""
        return sum(8 * math.prod(shape) + 4 for shape in shapes.values())
