"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, algorithm 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luban.optim.adamw import check_adam
from luban.optim.base import Roles, Shapes
from luban.optim.tensorwise import State, Tensorwise, TensorwiseConfig

SIDES = ("left", "right")


class SoapGroups(Tensorwise):
    """The update. Vectors, sides longer than `largest` and tensors of more dimensions are not turned: there it is Adam's.

    The host must know when bases are due. On a CPU it reads the count of steps. Reading it from another device would wait, so
    there it is read until the first good step is behind, and then the host counts `calls` itself: bad steps after that
    count too, and bases are due a step earlier for each.
    """

    on_host = frozenset({"calls"})

    def begin(self, weight: Tensor, group: dict[str, Any]) -> State:
        """Moments 0; each side's covariance 0 and basis the identity."""
        state = {
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
            "step": torch.zeros((), device=weight.device),
            "calls": torch.zeros((), dtype=torch.int64),
        }
        for side, size in self._sides(weight, group).items():
            state[side] = weight.new_zeros(size, size)
            state[f"{side}_basis"] = torch.eye(size, dtype=weight.dtype, device=weight.device)
        return state

    def advance(
        self, weight: Tensor, gradient: Tensor, state: State, lr: float, group: dict[str, Any]
    ) -> tuple[Tensor, State]:
        """The first gradient only gives the bases, so that none is ever turned by a basis made of itself alone."""
        (beta1, beta2), step = group["betas"], state["step"] + 1
        sides = self._sides(weight, group)
        first_of_all = (step == 1) & bool(sides)
        turned = self._turn(gradient, state)
        first = torch.lerp(gradient, state["exp_avg"], beta1)
        second = torch.lerp(turned.square(), state["exp_avg_sq"], beta2)
        counted = (step.double() - int(bool(sides))).clamp_min(1)
        correction = ((1 - beta2**counted).sqrt() / (1 - beta1**counted)).to(weight.dtype)
        direction = self._turn(self._turn(first, state) / (second.sqrt() + group["eps"]), state, back=True)
        moved = weight - lr * correction * direction
        moved = moved - lr * group["decay"] * moved
        calls = int(state["step"] if weight.device.type == "cpu" else state["calls"]) or int(state["step"])
        new = {"step": step, "calls": torch.tensor(calls + 1 if calls else 0)}
        new["exp_avg"] = torch.where(first_of_all, state["exp_avg"], first)
        new["exp_avg_sq"] = torch.where(first_of_all, state["exp_avg_sq"], second)
        for side in sides:
            square = gradient @ gradient.mT if side == "left" else gradient.mT @ gradient
            new[side] = torch.lerp(square, state[side], beta2)
        new |= self._bases({**state, **new}, calls, group, list(sides))
        return torch.where(first_of_all, weight, moved), new

    def _bases(self, state: State, before: int, group: dict[str, Any], sides: list[str]) -> State:
        """Bases for the next step: eigenvectors after the first, then now and then one step of orthogonal iteration.

        Args:
            before: steps before this one.
        """
        found: State = {}
        if not sides or before % group["every"]:
            return found
        second = state["exp_avg_sq"]
        for side in sides:
            square, basis = state[side], state[f"{side}_basis"]
            if not before:
                found[f"{side}_basis"] = torch.linalg.eigh(square.double()).eigenvectors.flip(-1).to(square.dtype)
                continue
            order = (basis * (square @ basis)).sum(0).argsort(descending=True)  # estimated eigenvalues
            second = second.index_select(0 if side == "left" else 1, order)
            found[f"{side}_basis"] = torch.linalg.qr(square @ basis[:, order]).Q
        return {**found, "exp_avg_sq": second}

    @staticmethod
    def _sides(weight: Tensor, group: dict[str, Any]) -> dict[str, int]:
        """Side → its length, of those that are turned."""
        if weight.dim() != 2 or not group["matrices"]:
            return {}
        return {side: size for side, size in zip(SIDES, weight.shape, strict=True) if size <= group["largest"]}

    @staticmethod
    def _turn(x: Tensor, state: State, *, back: bool = False) -> Tensor:
        """x in the bases' coordinates, or from them."""
        if "left_basis" in state:
            x = (state["left_basis"] if back else state["left_basis"].mT) @ x
        if "right_basis" in state:
            x = x @ (state["right_basis"].mT if back else state["right_basis"])
        return x


@dataclass(frozen=True, kw_only=True)
class Soap(TensorwiseConfig):
    """Second moments along the directions in which gradients vary most."""

    algorithm = SoapGroups
    lr: float = 3e-3  # peak learning rate
    weight_decay: float = 0.01  # decoupled decay (times the learning rate), on matrices only
    betas: tuple[float, float] = (0.95, 0.95)  # decay of the momentum, and of second moments and covariances
    eps: float = 1e-8  # added to the root of the second moment
    every: int = 10  # steps between changes of the bases
    largest: int = 10_000  # sides that are turned

    def __post_init__(self):
        super().__post_init__()
        check_adam(self.betas, self.eps)
        if min(self.every, self.largest) < 1:
            raise ValueError(f"every and largest must be at least 1, {self.every} and {self.largest} given")

    def settings(self) -> dict[str, Any]:
        """All of them."""
        return {"betas": self.betas, "eps": self.eps, "every": self.every, "largest": self.largest}

    def state_bytes(self, shapes: Shapes, roles: Roles) -> int:
        """Two moments, and of each side its covariance and basis."""
        total = 0
        for shape in shapes.values():
            sides = [size for size in shape if size <= self.largest] if len(shape) == 2 else []
            total += 8 * math.prod(shape) + 12 + 8 * sum(size**2 for size in sides)
        return total

    def update_flops(self, shapes: Shapes, roles: Roles) -> int:
        """Turning gradient, momentum and update, and the covariances."""
        matrices = [shape for shape in shapes.values() if len(shape) == 2]
        return sum(8 * math.prod(shape) * size for shape in matrices for size in shape if size <= self.largest)
