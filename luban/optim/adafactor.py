"""Adafactor: a matrix's second moments as an outer product, updates clipped by their size, steps relative to the weights
(Shazeer & Stern 2018, algorithms 4 and 5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luban.optim.base import Roles, Shapes
from luban.optim.tensorwise import State, Tensorwise, TensorwiseConfig


class AdafactorGroups(Tensorwise):
    """The update. Of tensors with more than two dimensions the last two are factored."""

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        """Second moments 0: of rows and columns, or of every number of a vector."""
        state = {"step": torch.zeros((), device=weight.device)}
        if weight.dim() < 2:
            return {**state, "exp_avg_sq": torch.zeros_like(weight)}
        return {**state, "rows": torch.zeros_like(weight[..., 0]), "columns": torch.zeros_like(weight[..., 0, :])}

    def advance(
        self, weight: Tensor, gradient: Tensor, state: State, lr: float, group: dict[str, Any]
    ) -> tuple[Tensor, State]:
        """u = g / √v, v = rows ⊗ columns / mean(rows); w ← w − lr·max(ε₂, rms(w))·u / max(1, rms(u) / d) − lr·λ·w."""
        step = state["step"] + 1
        beta = (1 - step.double() ** -group["decay_power"]).to(weight.dtype)
        squares = gradient.square() + group["eps"][0]
        if weight.dim() < 2:
            second = beta * state["exp_avg_sq"] + (1 - beta) * squares
            new_state = {"step": step, "exp_avg_sq": second}
        else:
            rows = beta * state["rows"] + (1 - beta) * squares.mean(-1)
            columns = beta * state["columns"] + (1 - beta) * squares.mean(-2)
            second = rows[..., :, None] * columns[..., None, :] / rows.mean(-1)[..., None, None]
            new_state = {"step": step, "rows": rows, "columns": columns}
        direction = gradient * second.rsqrt()
        direction = direction / (_rms(direction) / group["clip"]).clamp_min(1.0)
        size = _rms(weight).clamp_min(group["eps"][1]) if group["relative"] else 1.0
        return weight - lr * size * direction - lr * group["decay"] * weight, new_state


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@dataclass(frozen=True, kw_only=True)
class Adafactor(TensorwiseConfig):
    """State of one number a row and column instead of two a weight."""

    algorithm = AdafactorGroups
    lr: float = 1e-2  # peak learning rate, as a share of each tensor's root mean square where `relative`
    relative: bool = True  # steps are relative to the weights
    eps: tuple[float, float] = (1e-30, 1e-3)  # added to squared gradients; smallest root mean square of weights
    clip: float = 1.0  # largest root mean square of an update before the learning rate
    decay_power: float = 0.8  # second moments decay by 1 − step^−this

    def __post_init__(self):
        super().__post_init__()
        if min(self.eps) <= 0 or self.clip <= 0 or not 0 < self.decay_power <= 1:
            raise ValueError(
                f"eps and clip must be above 0 and decay_power in (0, 1]: {self.eps}, {self.clip} and {self.decay_power} given"
            )

    def settings(self) -> dict[str, Any]:
        """All of them."""
        return {"relative": self.relative, "eps": self.eps, "clip": self.clip, "decay_power": self.decay_power}

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        """Rows and columns, or a vector's second moments, and a count."""
        total = 0
        for shape in shapes.values():
            size = math.prod(shape)
            total += 4 + 4 * (size // shape[-1] + size // shape[-2] if len(shape) > 1 else size)
        return total
