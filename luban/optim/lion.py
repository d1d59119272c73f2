"""Lion: the sign of a momentum (Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luban.optim.adamw import check_adam
from luban.optim.base import Roles, Shapes
from luban.optim.tensorwise import State, Tensorwise, TensorwiseConfig


class LionGroups(Tensorwise):
    """The update."""

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        """Momentum 0."""
        return {"momentum": torch.zeros_like(weight)}

    def advance(
        self, weight: Tensor, gradient: Tensor, state: State, lr: float, group: dict[str, Any]
    ) -> tuple[Tensor, State]:
        """w ← w − lr·(sign(β₁m + (1 − β₁)g) + λw); m ← β₂m + (1 − β₂)g."""
        beta1, beta2 = group["betas"]
        direction = torch.lerp(gradient, state["momentum"], beta1).sign()
        return weight - lr * (direction + group["decay"] * weight), {
            "momentum": torch.lerp(gradient, state["momentum"], beta2)
        }


@dataclass(frozen=True, kw_only=True)
class Lion(TensorwiseConfig):
    """Every weight moves by the learning rate, which is some 3 to 10 times smaller than AdamW's, with as much larger decay."""

    algorithm = LionGroups
    elementwise = True
    lr: float = 1e-4  # peak learning rate
    weight_decay: float = 1.0  # decoupled decay (times the learning rate), on matrices only
    betas: tuple[float, float] = (0.9, 0.99)  # of what is stepped along, and of the momentum that is kept

    def __post_init__(self):
        super().__post_init__()
        check_adam(self.betas, 1.0)

    def settings(self) -> dict[str, Any]:
        """The betas."""
        return {"betas": self.betas}

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        """One momentum."""
        return sum(4 * math.prod(shape) for shape in shapes.values())
