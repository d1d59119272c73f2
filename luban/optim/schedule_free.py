"""Schedule-free AdamW (Defazio et al. 2024, "The road less scheduled", algorithm 1 and section 4.1; as the authors' code)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luban.optim.adamw import check_adam
from luban.optim.base import Roles, Shapes
from luban.optim.tensorwise import State, Tensorwise, TensorwiseConfig


class ScheduleFreeGroups(Tensorwise):
    """The update. z takes Adam's steps without momentum, x averages z, gradients are taken at y = (1 − β₁)z + β₁x.

    The parameters are y; z is state; x, the weights that a run is evaluated and saved with, follows from both.
    """

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        """z as the weights are, second moments 0."""
        number = torch.zeros((), dtype=torch.float64, device=weight.device)
        return {
            "z": weight.clone(),
            "exp_avg_sq": torch.zeros_like(weight),
            "step": torch.zeros((), device=weight.device),
            "highest_lr": number,
            "weight_sum": number.clone(),
        }

    def advance(
        self, weight: Tensor, gradient: Tensor, state: State, lr: float, group: dict[str, Any]
    ) -> tuple[Tensor, State]:
        """c = γ² / Σγ², γ the highest lr so far; u = g / (√v̂ + ε) + λy; x ← (1 − c)x + c(z − lr·u); z ← z − lr·u."""
        beta1, beta2 = group["betas"]
        step, highest = state["step"] + 1, state["highest_lr"].clamp_min(lr)
        second = torch.lerp(gradient.square(), state["exp_avg_sq"], beta2)
        left = (1 - beta2 ** step.double()).to(weight.dtype)
        direction = gradient / ((second / left).sqrt() + group["eps"]) + group["decay"] * weight
        total = state["weight_sum"] + highest.square()
        share = torch.where(total > 0, highest.square() / total, 0.0)
        moved = torch.lerp(weight, state["z"], share.to(weight.dtype))
        moved = moved + (lr * (beta1 * (1 - share) - 1)).to(weight.dtype) * direction
        z = state["z"] - lr * direction
        return moved, {"z": z, "exp_avg_sq": second, "step": step, "highest_lr": highest, "weight_sum": total}

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """x = y + (1 − 1/β₁)(z − y) of every parameter that has been updated."""
        found = {}
        for group in self.groups:
            beyond = 1 - 1 / group["betas"][0]
            for parameter in group["params"]:
                if state := self.state[parameter]:
                    z = state["z"]
                    found[parameter] = torch.lerp(parameter.detach().to(z.dtype), z, beyond).to(parameter.dtype)
        return found


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(TensorwiseConfig):
    """AdamW without a schedule: after warm-up the rate stays, and averaging takes the place of its decay.

    Training can end at any step. Evaluation, checkpoints and what is exported have the averaged weights; a checkpoint keeps those that
    gradients are taken at in the optimizer's state.
    """

    algorithm = ScheduleFreeGroups
    elementwise = True
    keeps_rate = True
    lr: float = 2.5e-3  # learning rate after warm-up
    betas: tuple[float, float] = (
        0.9,
        0.999,
    )  # β₁: share of the average where gradients are taken; decay of second moments
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        check_adam(self.betas, self.eps)
        if not self.betas[0] > 0:
            raise ValueError(f"the first of betas must be above 0, {self.betas} given")

    def settings(self) -> dict[str, Any]:
        """Betas and eps."""
        return {"betas": self.betas, "eps": self.eps}

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        """z, second moments and three numbers."""
        return sum(8 * math.prod(shape) + 20 for shape in shapes.values())
